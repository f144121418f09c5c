"""All that is asked of the one run.

In one file, because tests are shared out among processes by file: in four the run would be made four times.
"""

from tests.observability.checks.contract import *  # noqa: F403
from tests.observability.checks.panels import *  # noqa: F403
from tests.observability.checks.pictures import *  # noqa: F403
from tests.observability.checks.sums import *  # noqa: F403
from tests.observability.checks.truth import *  # noqa: F403
from tests.observability.checks.values import *  # noqa: F403
