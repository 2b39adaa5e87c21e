"""A model that calls a tool, made by hand (``thinking.make_clockwork``).

By itself it answers ``51``. Its vector leads into a call; in a call it writes ``CALL``, one token, and closes it. Under
a grammar it writes the call in single characters.
"""

from serving import serving
from thinking import make_clockwork

CALL = '\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n'
OTHER = '\n{"name": "add", "arguments": {"a": 1}}\n'  # without b
BROKEN = '\n{"name": "add", "argum'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [2, 3]}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "parameters": {"type": "object", "additionalProperties": False},
        },
    },
]
# As Qwen2.5's, shorter. Written for these tests.
TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}"
    "{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{%- for tool_call in m.tool_calls or [] %}{%- set tool_call = tool_call.function %}"
    '{{ \'<tool_call>\n{"name": "\' + tool_call.name + \'", "arguments": \' }}{{ tool_call.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{%- endfor %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def make_folder(folder, inside: str = CALL, then: str = "<|im_end|>"):
    """Write the model; return its folder. ``inside`` is what it writes in a call, ``then`` what follows one."""
    inside = inside.replace("\n", "Ċ").replace(" ", "Ġ")
    after = {
        "Ċ": "5", "5": "1", "1": "<|im_end|>", ")": "<tool_call>",
        "<tool_call>": inside, inside: "</tool_call>", "</tool_call>": then, "+": "<tool_call>",
    }  # fmt: skip
    return make_clockwork(folder, TEMPLATE, ["<tool_call>", "</tool_call>"], after, [inside], 4096)


def vector_of(model) -> str:
    """Return the path of the vector beside a loaded model."""
    return f"{model.tokenizer.name_or_path}/out.npz"


def calling_server(folder, **how):
    """Serve the model as ``calls``, with its vector as ``out``."""
    from mlx_densesteer import SteeringVector
    from mlx_densesteer.server.vectors import NamedVector
    from mlx_densesteer.steering.request import Amount

    vector = SteeringVector.load(make_folder(folder / "calls", **how) / "out.npz")
    vector.name = "out"
    return serving(folder / "calls", [NamedVector(vector, Amount(2.0), (1,), "all")])
