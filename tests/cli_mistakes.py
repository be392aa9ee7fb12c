"""Wrong functions, files, options and values for every command, and what the one line about each says."""

USER = """
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))

def make(): return model(), (torch.randn(2, 4),)
def raises(): raise KeyError("weights\\nof the model")
def raises_deep(): return torch.zeros(2) @ torch.zeros(3)
def leaves(): raise SystemExit(3)
def needs(width): return model(), (torch.randn(2, width),)
def nothing(): pass
def number(): return 3
def four(): return 1, 2, 3, 4
def only_model(): return model()
def no_module(): return "model", (torch.randn(2, 4),)
def no_tensor(): return model(), (1, 2)
def mapping(): return model(), {"input": torch.randn(2, 4)}
def bad_kwargs(): return model(), (torch.randn(2, 4),), [1]
def wrong_shape(): return model(), (torch.randn(2, 5),)
def wrong_dtype(): return model(), (torch.randint(0, 2, (2, 4)),)
def wrong_name(): return model(), (), {"inputs": torch.randn(2, 4)}
def too_many(): return model(), (torch.randn(2, 4), torch.randn(2, 4))
async def later(): return make()
def generator(): yield make()
constant = 3
"""


FUNCTIONS = {
    "mymodels": "not of the form module:function",
    ":make": "not of the form module:function",
    "mymodels.py:make": "name the module as an import does",
    "./mymodels:make": "name the module as an import does",
    "nomodule:make": "run the command in the folder that holds the module",
    "mymodels:gone": "has no 'gone'",
    "mymodels:constant": "is no function but of type int",
    "mymodels:raises": "raised KeyError at mymodels.py:9",
    "mymodels:raises_deep": "raised RuntimeError at mymodels.py:10",
    "mymodels:leaves": "raised SystemExit at mymodels.py:11",
    "mymodels:needs": "is called without arguments: missing a required argument: 'width'",
    "mymodels:nothing": "must return (model, args) or (model, args, kwargs), not None",
    "mymodels:number": "not of type int",
    "mymodels:later": "is an async function, which nothing awaits here",
    "mymodels:generator": "not of type generator",
    "mymodels:four": "not of type tuple of 4",
    "mymodels:only_model": "not of type Sequential",
    "mymodels:no_module": "its model is of type str",
    "mymodels:no_tensor": "no tensor among the inputs",
    "mymodels:mapping": "return (model, (), kwargs)",
    "mymodels:bad_kwargs": "its kwargs are of type list",
    "broken_syntax:make": "raised SyntaxError at broken_syntax.py:2",
    "broken_import:make": "raised ModuleNotFoundError at broken_import.py:1: No module named 'not_there'",
    "broken_name:make": "raised ImportError at broken_name.py:1",
    "broken_value:make": "raised ZeroDivisionError at broken_value.py:1",
    "mymodels:wrong_shape": "called with the inputs that it returned, raised RuntimeError",
    "mymodels:wrong_dtype": "called with the inputs that it returned, raised RuntimeError",
    "mymodels:wrong_name": "called with the inputs that it returned, raised TypeError",
    "mymodels:too_many": "called with the inputs that it returned, raised TypeError",
}
WITH_FUNCTION = {
    "export": ("export", "{}", "-o", "out.onnx"),
    "verify": ("verify", "base.onnx", "{}"),
    "bench": ("bench", "{}", "--rounds", "2", "--no-compiled"),
}
# What a command reads and writes: files by the name of what is in their place.
READS = {
    "inspect": ("inspect", "{}"),
    "export": ("export", "mymodels:make", "-o", "out.onnx", "--adapter", "{}"),
    "export bank": ("export", "mymodels:make", "-o", "out.onnx", "--adapters", "bank", "--bank", "{}"),
    "fold base": ("fold", "{}", "a.safetensors", "-o", "out.onnx"),
    "fold adapter": ("fold", "base.onnx", "{}", "-o", "out.onnx"),
    "fold calibration": ("fold", "base.onnx", "a.safetensors", "-o", "out.onnx", "--calibration", "{}"),
    "bundle model": ("bundle", "{}", "-o", "out"),
    "bundle adapter": ("bundle", "input.onnx", "-o", "out", "--adapter", "{}", "--size", "batch=2"),
    "bundle inputs": ("bundle", "base.onnx", "-o", "out", "--inputs", "{}", "--size", "batch=2"),
    "convert": ("convert", "{}", "-o", "out.vectors", "--like", "input.onnx"),
    "convert like": ("convert", "a.safetensors", "-o", "out.vectors", "--like", "{}"),
    "combine": ("combine", "a.safetensors:1", "{}:-0.5", "-o", "out.safetensors"),
    "combine base": ("combine", "a.safetensors:1", "-o", "out.safetensors", "--trained", "add", "--base", "{}"),
    "verify artifact": ("verify", "{}", "base.onnx"),
    "verify reference": ("verify", "base.onnx", "{}"),
    "verify adapter": ("verify", "input.onnx", "input.onnx", "--adapter", "{}"),
    "ranges model": ("ranges", "{}", "x.npz"),
    "ranges inputs": ("ranges", "base.onnx", "{}"),
    "ranges adapter": ("ranges", "base.onnx", "x.npz", "--adapter", "{}"),
    "sign adapter": ("sign", "{}", "--key", "text.pem"),
    "sign key": ("sign", "a.safetensors", "--key", "{}"),
    "bundle key": ("bundle", "input.onnx", "-o", "out", "--size", "batch=2", "--verify-key", "{}"),
    "export calibration": (
        *("export", "mymodels:make", "-o", "out.onnx", "--half", "--keep-float32", "auto", "--calibration", "{}"),
    ),
    "engine model": ("engine", "{}", "-o", "out.engine"),
    "engine adapter": ("engine", "base.onnx", "-o", "out.engine", "--adapter", "{}", "--size", "batch=2"),
    "refit engine": ("refit", "{}", "a.safetensors"),
}
WRONG_FILES = (
    *("gone", "gone.onnx", "folder", "empty", "empty.onnx", "text.npz", "text.onnx", "text.safetensors"),
    *("text.vectors", "text.onnx_adapter", "text.engine", "half.npz", "half.onnx", "half.safetensors", "objects.npz"),
)
WRITES = {
    "export": ("export", "mymodels:make", "-o", "{}.onnx"),
    "fold": ("fold", "base.onnx", "a.safetensors", "-o", "{}.onnx"),
    "bundle": ("bundle", "base.onnx", "-o", "{}", "--size", "batch=2"),
    "convert": ("convert", "a.safetensors", "-o", "{}.vectors", "--like", "input.onnx"),
    "combine": ("combine", "a.safetensors:0.5", "-o", "{}.safetensors"),
    "engine": ("engine", "base.onnx", "-o", "{}.engine", "--size", "batch=2"),
    "demo": ("demo", "--quick", "-o", "{}"),
}
USAGE = [
    ("frobnicate",),
    ("--frobnicate",),
    ("export",),
    ("export", "mymodels:make"),
    ("export", "mymodels:make", "-o", "m.onnx", "--opset", "new"),
    ("inspect", "a", "b"),
    ("bench", "--rounds", "many"),
    ("fold", "base.onnx", "a.safetensors", "--wrong"),
    ("export", "mymodels:make", "-o", "out.onnx", "--adapters", "glue"),
    ("combine", "-o", "out.safetensors"),
    ("combine", "a.safetensors:1"),
    ("bundle", "base.onnx", "-o", "out", "--jetpack", "1"),
    ("engine", "base.onnx", "-o", "out.engine", "--precision", "fp15"),
]
VALUES = [
    (("export", "mymodels:make", "-o", "out.onnx", "--opset", "3"), "is the oldest"),
    (("export", "mymodels:make", "-o", "out.onnx", "--dynamic", "batch"), "is not of the form 0=batch"),
    (("export", "mymodels:make", "-o", "out.onnx", "--dynamic", "5=deep"), "no input with an axis 5"),
    (
        ("export", "mymodels:make", "-o", "out.onnx", "--dynamic", "1=batch"),
        "'batch' is 2 in one place and another size in axis 1",
    ),
    (("export", "mymodels:make", "-o", "out.onnx", "--dynamic", "y:0=rows"), "no input 'y' with an axis 0"),
    (("verify", "base.onnx", "base.onnx", "--size", "batch"), "is not of the form batch=8"),
    (("verify", "base.onnx", "base.onnx", "--size", "rows=3"), "sizes of rows, which base.onnx does not have"),
    (("verify", "base.onnx", "base.onnx", "--size", "input=3x5"), "is ['batch', 4] in the model, not [3, 5]"),
    (("verify", "base.onnx", "base.onnx", "--size", "batch=3x5"), "'batch' is one dimension"),
    (("verify", "base.onnx", "mymodels:make", "--size", "batch=3"), "--size is for two ONNX models"),
    (("verify", "base.onnx", "other.onnx"), "can't run other.onnx"),
    (("verify", "base.onnx", "base.onnx", "--adapter", "a.safetensors"), "(mode 'base') take no adapter"),
    (("verify", "base.onnx", "base.onnx", "--adapter", "gone.safetensors"), "(mode 'base') take no adapter"),
    (("bundle", "base.onnx", "-o", "out", "--size", "batch=8,4,2"), "is not smallest, usual, largest"),
    (("bundle", "base.onnx", "-o", "out", "--size", "rows=8"), "shapes names rows; the model's inputs are"),
    (("bundle", "base.onnx", "-o", "out", "--size", "batch=8x2"), "a dimension takes three numbers"),
    (("bundle", "base.onnx", "-o", "out"), "--size batch=1,8,32"),
    (("engine", "base.onnx", "-o", "out.engine", "--size", "x=1x2,3,4"), "different numbers of axes"),
    (("bench", "mymodels:make", "--rounds", "1"), "at least 2 are needed"),
    (("fold", "base.onnx", "a.safetensors", "-o", "out.onnx", "--calibration", "wrong.npz"), "names ['weights']; the"),
    (("convert", "a.safetensors", "-o", "out.txt"), "the ending names the format"),
    *(
        (("combine", word, "-o", "out.safetensors"), f"{word!r} is not PATH:WEIGHT")
        for word in (
            ":",
            "1",
            ":1",
            "a.safetensors:",
            "b:nan",
            "b:inf",
            "b:1_0",
            "b:0,5",
            "b:1/3",
            "b:--1",
            "b:0x1",
            "b:٣",
        )
    ),
    (("combine", "a.safetensors", "-o", "out.safetensors"), "a file and a number: a.safetensors:1"),
    (("combine", "a.safetensors:1", "a.safetensors:2", "-o", "out.safetensors"), "is given twice"),
    (("combine", "a.safetensors:1", "./a.safetensors:2", "-o", "out.safetensors"), "are one file"),
    (("combine", "a.safetensors:1e999", "-o", "out.safetensors"), "give a finite number"),
    (("combine", "a.safetensors:1e60", "-o", "out.safetensors"), "the sum does not fit its dtype"),
    (("combine", "a.safetensors:1", "-o", "out.safetensors", "--trained", "glue"), "trained='glue' is not one of"),
    (("combine", "a.safetensors:1", "-o", "out.safetensors", "--trained", "from:b"), "is none of the adapters"),
    (("combine", "a.safetensors:1", "-o", "out.safetensors", "--base", "b"), "base= is for an adapter .gguf, or for"),
    (("combine", "a.safetensors:1", "-o", "out.onnx"), "a file that ends in .onnx is an ONNX model"),
]
# A name of a file that is empty, as of a variable that is not set: what stands before it is told.
EMPTY = [
    *(tuple("" if "{}" in word else word for word in words) for words in (READS | WRITES).values()),
    ("bench", ""),
    ("export", "", "-o", "out.onnx"),
    ("combine", "", "-o", "out.safetensors"),
    ("verify", " ", "base.onnx"),
    ("fold", "base.onnx", "a.safetensors", "--output="),
    ("fold", "", "", "-o", ""),
]
