"""Seeing what happened: decoding in the terminal, and self-contained HTML pages."""

from mdlm_interp.viewer.film import Film, Frame, State
from mdlm_interp.viewer.graph_page import graph_page
from mdlm_interp.viewer.page import Link, html_page, write_page
from mdlm_interp.viewer.trajectory_page import trajectory_page

__all__ = ["Film", "Frame", "State", "Link", "html_page", "write_page", "trajectory_page", "graph_page"]
