"""Under `torch.compile`, in one graph: the operation, the loss and whole models give what they give without it.

In a process of its own: the annotations that the tests execute are nothing that can be compiled.
"""

import subprocess
import sys

PROGRAM = """
import torch
from cratelm.model.config import ModelConfig
from cratelm.model.crate import ISTA
from cratelm.model.language_model import LanguageModel
from cratelm.model.loss import mean_loss

torch.manual_seed({seed})
small = dict(d_model=16, num_heads=2, vocab_size=100, context_length=16)

def compare(function, inputs, leaves):
    torch.compiler.reset()
    compiled, results = torch.compile(function, backend="aot_eager", fullgraph=True), []
    for call in (function, compiled):
        output = sum(torch.as_tensor(part).square().sum() for part in call(*inputs))
        results.append([output, *torch.autograd.grad(output, leaves)])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-5)

for changes, recompute in (({{}}, True), ({{"learned_step_size": True, "learned_penalty": True}}, False)):
    ista = ISTA(ModelConfig(arch="crate", num_layers=1, **small, **changes))
    torch.nn.init.uniform_(ista.atoms, -0.6, 0.6)
    ista.recompute = recompute
    x = torch.randn(2, 5, 16, requires_grad=True)
    compare(ista, [x], [x, *ista.parameters()])

features, head = torch.randn(37, 8, requires_grad=True), torch.randn(101, 8, requires_grad=True)
targets = torch.randint(101, (37,))
compare(lambda f, h: [mean_loss(f, h, targets, rows=10)], [features, head], [features, head])

attention = dict(rotary=True, shifted_keys=True, normalised=True, strict_mask=True)
for changes in (
    dict(arch="crate"), dict(arch="crate", **attention), dict(arch="gpt2", activation_l1=0.1, top_k_activations=3),
):
    model = LanguageModel(ModelConfig(num_layers=1, **small, **changes)).initialise(0)
    tokens = torch.randint(100, (2, 16))
    compare(model.objective, [tokens, tokens], list(model.parameters()))
print("equal")
"""


def test_compiled_models_have_the_same_losses_and_gradients() -> None:
    program = PROGRAM.format(seed=0)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "equal", result.stderr[-2000:]
