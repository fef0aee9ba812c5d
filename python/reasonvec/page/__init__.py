"""Reports as self-contained HTML pages."""

from reasonvec.page.inspection import inspection_page
from reasonvec.page.spectrum import spectrum_page

__all__ = ["inspection_page", "spectrum_page"]
