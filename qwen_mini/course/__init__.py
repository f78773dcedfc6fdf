"""The hand-written machinery that no chapter teaches: scales, artifacts, claims, figures, the runner, the command line.

Importing it loads neither a chapter module nor Jupyter nor matplotlib.
"""

from . import artifacts, figures, hardware, stages
from .artifacts import ArtifactError, MissingStage
from .claims import claim
from .errors import CourseError
from .paths import home, runs
from .processes import side_by_side
from .records import experiment, experiments, opted, recall
from .scales import ScaleConfig, ScaleError, load_scale
from .session import oracle, start
from .show import say, table
