"""What measures speed; README.md holds commands, machines and figures."""

from sharegpt4v.engine.memory import use_huge_pages

use_huge_pages()  # as build_engine does: before torch makes a tensor, for all sides
