"""The one table of what we do otherwise than mergekit 0.1.5, on purpose. `test_deviations.py` shows every row on both sides.

docs/conformance.md lists the rows; a test holds the two together.
"""

from dataclasses import dataclass

_TOKENS = (
    "{merge_method: task_arithmetic, base_model: $base, models: [{model: $tokens-ada}, {model: $tokens-bob}], "
    "parameters: {weight: 0.5}, dtype: float32, "
)
_ADA = "{merge_method: linear, models: [{model: $ada}], parameters: {weight: 1}, dtype: float32, "


@dataclass(frozen=True)
class Deviation:
    """A row of the table.

    recipe: what both are given. refused: a pattern of the message with which we refuse it (mergekit does not).
    fails: a part of the message with which mergekit fails (we do not). like: a recipe without the trouble, whose
    result by mergekit ours must be. Rows with none of these have a test of their own.
    """

    mergekit: str
    ours: str
    why: str
    recipe: str = ""
    refused: str = ""
    fails: str = ""
    like: str = ""

    def cells(self) -> str:
        return f"{self.mergekit} | {self.ours} | {self.why}"


DEVIATIONS: dict[str, Deviation] = {
    "unknown-key": Deviation(
        "ignores keys that it does not know",
        "refuses them and names the nearest known one",
        "a misspelt key is a merge other than the one that was meant",
        _ADA + "out_dtyp: bfloat16}",
        refused="unknown key 'out_dtyp'",
    ),
    "unknown-parameter": Deviation(
        "ignores parameters that the method does not have",
        "refuses those that no method has, and tells the others",
        "a misspelt parameter leaves the default in force",
        "{merge_method: linear, models: [{model: $ada}], parameters: {weight: 1, wieght: 2}}",
        refused="unknown parameter of linear 'wieght'",
    ),
    "linear-sum-to-zero": Deviation(
        "divides by 0: every weight is infinite or NaN",
        "refuses linear weights that sum to 0",
        "the model is broken",
        "{merge_method: linear, models: [{model: $ada, parameters: {weight: 1}}, {model: $bob, parameters: {weight: -1}}]}",
        refused="sum other than 0",
    ),
    "multislerp-sum-to-zero": Deviation(
        "divides by 0: every weight is infinite or NaN",
        "refuses multislerp weights that sum to 0",
        "the model is broken",
        "{merge_method: multislerp, models: [{model: $ada, parameters: {weight: 1}}, {model: $bob, parameters: {weight: -1}}]}",
        refused="sum other than 0",
    ),
    "density-beyond": Deviation(
        "takes a density above 1 as 1",
        "refuses it",
        "a share is at most 1; 50 for 50 % would keep everything",
        "{merge_method: ties, base_model: $base, models: [{model: $ada}], parameters: {weight: 1, density: 50}}",
        refused=r"from 0.* to 1.*, got 50",
    ),
    "layers-of-nothing": Deviation(
        "writes a model without layers for an empty or reversed `layer_range`",
        "refuses it",
        "the model is broken",
        "{merge_method: passthrough, slices: [{sources: [{model: $ada, layer_range: [3, 1]}]}]}",
        refused="first < end",
    ),
    "nan": Deviation(
        "merges NaN into the result",
        "refuses a source with NaN or infinity and names the tensor",
        "the download or the training is broken, and so would be the merge",
        "{merge_method: linear, models: [{model: $broken}, {model: $ada}], parameters: {weight: 1}}",
        refused=r"model\.norm\.weight.*finite",
    ),
    "pickles": Deviation(
        "reads pickled weights (`pytorch_model.bin`)",
        "refuses them and says how to convert them",
        "a pickle can run code when it is opened",
        "{merge_method: passthrough, models: [{model: $pickled}]}",
        refused="pickle",
    ),
    "base-unlisted-in-slices": Deviation(
        "adds an unlisted base to `models` but not to `slices`, where methods on deltas then refuse the recipe",
        "takes the same layers of the base as of the first source",
        "there is one thing that the recipe can mean",
        "{merge_method: task_arithmetic, base_model: $base, dtype: float32, "
        "slices: [{sources: [{model: $ada, layer_range: [1, 3], parameters: {weight: 0.5}}]}]}",
        fails="Base input is not present",
        like="{merge_method: task_arithmetic, base_model: $base, dtype: float32, "
        "slices: [{sources: [{model: $ada, layer_range: [1, 3], parameters: {weight: 0.5}}, {model: $base, layer_range: [1, 3]}]}]}",
    ),
    "slerp-of-one-in-slices": Deviation(
        "refuses a slice with one source",
        "takes the same layers of the base as the other model, as with `models`",
        "`t` was given to be used",
        "{merge_method: slerp, base_model: $base, dtype: float32, parameters: {t: 0.4}, "
        "slices: [{sources: [{model: $ada, layer_range: [1, 3]}]}]}",
        fails="Base input is not present",
        like="{merge_method: slerp, base_model: $base, dtype: float32, parameters: {t: 0.4}, "
        "slices: [{sources: [{model: $ada, layer_range: [1, 3]}, {model: $base, layer_range: [1, 3]}]}]}",
    ),
    "model-twice": Deviation(
        "refuses a model that is listed twice",
        "counts each entry",
        "the recipe says so",
        "{merge_method: linear, dtype: float32, models: [{model: $ada, parameters: {weight: 1}}, "
        "{model: $ada, parameters: {weight: 3}}, {model: $bob, parameters: {weight: 2}}]}",
        fails="Duplicate merge inputs",
        like="{merge_method: linear, dtype: float32, models: [{model: $ada, parameters: {weight: 4}}, "
        "{model: $bob, parameters: {weight: 2}}]}",
    ),
    "layers-of-one-model": Deviation(
        "refuses two layers of one model in a slice",
        "merges them as if they came from two models",
        "the recipe says so; depth compression by averaging neighbours needs it",
        "{merge_method: linear, dtype: float32, slices: [{sources: [{model: $ada, layer_range: [0, 2], parameters: {weight: 1}}, "
        "{model: $ada, layer_range: [2, 4], parameters: {weight: 3}}]}]}",
        fails="Duplicate merge inputs",
    ),
    "stacked-qwen": Deviation(
        "fails where Qwen2 gets another number of layers: transformers 5 gives its config a list `layer_types`, which stays as long as it was",
        "gives the lists in the config one entry for each layer of the result",
        "stacks and prunings of Qwen2 are ordinary recipes",
        "{merge_method: passthrough, dtype: float32, slices: [{sources: [{model: $qwen-ada, layer_range: [0, 2]}]}, "
        "{sources: [{model: $qwen-bob, layer_range: [1, 3]}]}]}",
        fails="layer_types",
    ),
    "head-of-more-sources": Deviation(
        "makes the final norm and the head of the first n sources of the last slice, n being the number in the first slice",
        "makes them of all sources of the last slice",
        "the last slice's layers are made of all of them, too",
        "{merge_method: linear, dtype: float32, slices: [{sources: [{model: $cyd, layer_range: [0, 2], parameters: {weight: 1}}]}, "
        "{sources: [{model: $ada, layer_range: [2, 4], parameters: {weight: 1}}, "
        "{model: $bob, layer_range: [2, 4], parameters: {weight: 3}}]}]}",
    ),
    "new-token": Deviation(
        "fails with a KeyError on a new token unless the vocabulary is a union",
        "adds it",
        "the vocabulary's source and the tokens added to it have nothing to do with each other",
        _TOKENS
        + 'tokenizer: {source: base, tokens: {"<|new|>": {source: {kind: model_token, model: $base, token: q}, force: true}}}}',
        fails="KeyError",
    ),
    "token-without-owner": Deviation(
        "gives zeros to a token that none of the models has that a tensor is made of",
        "fills its rows from the other models of the recipe",
        "with slices of different models, embedding and head have different sources",
        "{merge_method: passthrough, slices: [{sources: [{model: $ada, layer_range: [0, 2]}]}, "
        "{sources: [{model: $tokens-ada, layer_range: [2, 4]}]}], tokenizer_source: union, dtype: float32}",
    ),
    "union-order": Deviation(
        "numbers a union's added tokens in the order of a hash set, by PYTHONHASHSEED and the models' paths; without a base "
        "the vocabulary and chat template that it starts from, too",
        "goes by the order of the recipe, the base first",
        "the same recipe gives the same model",
        _TOKENS + "tokenizer_source: union}",
    ),
    "chat-templates": Deviation(
        "`chat_template` alpaca, exaone, llama3, mistral: stray or missing line breaks and spaces between turns; "
        "alpaca without the end-of-text token",
        "one layout for all turns, the end-of-text token after each answer; chatml is the same in both",
        "stray line breaks are tokens that a model is not asked to learn",
        "{merge_method: linear, models: [{model: $ada}], parameters: {weight: 1}, tokenizer_source: base, chat_template: NAME}",
    ),
    "equal-magnitudes": Deviation(
        "sorts magnitudes without stability: which of several equal ones are kept is left to the sort",
        "keeps the first",
        "the same recipe gives the same bytes; the number kept is the same",
        "{merge_method: ties, base_model: $grid, models: [{model: $steps}], parameters: {weight: 1, density: 0.5}, dtype: float32}",
    ),
    "scale-about": Deviation(
        "has no `about` in passthrough and ignores it",
        "scales what a tensor has beyond `about`",
        "in norms that multiply by 1 + weight (Gemma), about -1 the scale is that of the norm; routes with scales need it there",
        "{merge_method: passthrough, models: [{model: $ada, parameters: {scale: 0.5, about: -1}}], dtype: float32}",
    ),
    "sce-weight": Deviation(
        "has no `weight` in sce and ignores it",
        "multiplies the source's delta by it, and says so where it is not 1",
        "searches need a number per source; without weights, or with weight 1, both merge the same",
        "{merge_method: sce, base_model: $base, dtype: float32, parameters: {select_topk: 0.5}, "
        "models: [{model: $ada, parameters: {weight: 0.3}}, {model: $bob, parameters: {weight: 0.7}}]}",
    ),
    "arithmetic": Deviation(
        "computes in `dtype`, except in linear and slerp: bfloat16 is rounded after each step",
        "computes in float32 and rounds once, at the end",
        "the error of the sum is a fraction as large, at no cost",
        "{merge_method: task_arithmetic, base_model: $base-bf16, models: [{model: $ada-bf16}, {model: $bob-bf16}], "
        "parameters: {weight: 0.3}, dtype: bfloat16}",
    ),
    "mask-address": Deviation(
        "draws random masks one after another from one stream: each depends on all drawn before",
        "draws each from (seed, tensor, model): it depends on nothing else",
        "the same mask whatever the order, the threads and the other models; the statistics are the same (test_masks.py)",
        "{merge_method: dare_linear, base_model: $base, dtype: float32, "
        "models: [{model: $ada, parameters: {weight: 1, density: 0.5}}, {model: $bob, parameters: {weight: 0, density: OTHER}}]}",
    ),
}

if __name__ == "__main__":  # the rows of docs/conformance.md
    import sys

    sys.stdout.writelines(
        f"| `{name}` | {row.cells()} |\n" for name, row in DEVIATIONS.items()
    )
