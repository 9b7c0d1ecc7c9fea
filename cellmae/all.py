"Everything, for interactive work: `from cellmae.all import *`"
from .images import *
from .screen import *
from .stats import *
from .synth import *
from .data import *
from .patching import *
from .masking import *
from .fourier import *
from .vit import *
from .cavit import *
from .zoo import *
from .plots import *
from .train import *
from .embed import *
from .tvn import *
from .recall import *
from .report import *
