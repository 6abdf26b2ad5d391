"""Search spaces of merge weights, densities and methods.

Modules, from the bottom up:
    layers: Groups of consecutive layers.
    layout: How one weight or density per source is divided over layers and roles.
    method_parameters: Search ranges of per-method parameters such as gamma and epsilon.
    parameters: `ParameterSpace`, the names, distributions and conditions of all parameters.
    importance: How large the deltas are that each parameter governs.
    encode: A trial's parameters -> the recipe.
    tensor_settings, decode: A recipe -> the parameters that give it.
    space: `WeightSearchSpace`, which a study searches.
"""
