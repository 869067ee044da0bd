"""Tests mirror platform/, pipelines/, serve/ and cluster/; e2e/ runs commands, faults/ kills them."""
