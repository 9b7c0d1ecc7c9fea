__version__ = "0.1.0"

import warnings
from .docstrings import explain_rooms

explain_rooms(__path__[0], __spec__.loader)
warnings.filterwarnings('ignore', message='.*torch.jit.script.* is deprecated', category=FutureWarning) # of fastai's import
