"""Search spaces of routes through the layers of several models (data-flow space).

`passthrough` writes routes as recipes and reads them back; `space` has what all spaces of routes
share; `edits` and `indicators` are the two spaces.
"""

from paretomerge.space.routes.edits import EditSearchSpace
from paretomerge.space.routes.indicators import IndicatorSearchSpace
from paretomerge.space.routes.passthrough import (
    RouteLayer,
    recipe_to_route,
    route_to_recipe,
)
from paretomerge.space.routes.space import (
    RouteSearchSpace,
    handover_label,
    without_middle_label,
)

__all__ = [
    "EditSearchSpace",
    "IndicatorSearchSpace",
    "RouteLayer",
    "RouteSearchSpace",
    "handover_label",
    "recipe_to_route",
    "route_to_recipe",
    "without_middle_label",
]
