"""Model families: ShareGPT4V (LLaVA shape) and Share-Captioner, toy and full size."""
