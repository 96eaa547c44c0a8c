"""Fixtures: small decoders, and the networks in PyTorch (scripts/torch_networks.py) with weights that reveal errors."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.models.decoders.adaptive import Adaptive
from imgcap_jax.models.decoders.aoa import AttentionOnAttention
from imgcap_jax.models.decoders.att2in import Att2in
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.decoders.contract import Decoder
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.models.decoders.transformer import Transformer
from imgcap_jax.models.decoders.up_down import UpDown

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"


class Oracle:
    """Runs the PyTorch networks and compares encoders with them.

    Attributes:
        torch: the module ``torch``.
        networks: the module scripts/torch_networks.py.
    """

    def __init__(self, torch: Any, networks: Any) -> None:
        self.torch = torch
        self.networks = networks

    def images(self, batch: int, size: int) -> np.ndarray:
        """Pixels uint8 [B,h,w,3], the same for each call."""
        return np.random.default_rng(size).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)

    def pixels(self, network: Any, images: np.ndarray) -> Any:
        """The input of the network: normalised pixels."""
        return self.networks.normalised(self.torch.from_numpy(images), network.mean, network.std)

    def randomised(self, network: Any) -> Any:
        """Sets random weights under which activations neither vanish nor explode.

        The batch-norm statistics differ from those of the images.
        """
        nn = self.torch.nn
        self.torch.manual_seed(0)
        modules = list(network.modules())
        norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
        with self.torch.no_grad():
            for module in modules:
                if isinstance(module, nn.Conv2d) and module.bias is not None:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    module.bias.normal_(0, 0.3)
            for norm in norms:
                norm.momentum = 1.0
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0.5, 0.5)
            if norms:
                network.train().features(self.pixels(network, self.images(4, 96)))
            for norm in norms:
                norm.running_mean += 0.3 * self.torch.randn_like(norm.running_mean) * norm.running_var.sqrt()
                norm.running_var *= self.torch.empty_like(norm.running_var).uniform_(0.5, 2)
        return network.eval()

    def drawn(self, network: Any) -> Any:
        """Draws every parameter of a network with layer norms, so that a mistaken one changes the result."""
        random = self.torch.Generator().manual_seed(0)
        with self.torch.no_grad():
            for name, parameter in network.named_parameters():
                values = self.torch.randn(parameter.shape, generator=random)
                if parameter.ndim > 1 and not name.endswith(("_token", "pos_embed")):
                    values *= parameter[0].numel() ** -0.5
                elif name.endswith(("weight", "gamma", "gamma_1", "gamma_2")):
                    values = 1 + 0.3 * values
                else:
                    values *= 0.5
                parameter.copy_(values)
        return network.eval()

    def saved(self, network: Any, folder: Path) -> str:
        """Saves the state dict of the network; returns the path."""
        self.torch.save(network.state_dict(), folder / "network.pth")
        return str(folder / "network.pth")

    def regions(self, network: Any, images: np.ndarray) -> Any:
        """The last feature map as [B,N,C]."""
        return network.features(self.pixels(network, images)).flatten(2).transpose(1, 2)

    def check(self, network: Any, encoder: Any, images: np.ndarray) -> None:
        """Checks that the encoder's regions, and its logits if it has a classifier, equal those of the network."""
        regions, logits = self.run(encoder, images)
        assert regions.shape == (len(images), encoder.region_count, encoder.region_size)
        with self.torch.no_grad():
            self.close(regions, self.regions(network, images))
            if logits is not None:
                self.close(logits, network(self.pixels(network, images)))

    def check_regions(self, network: Any, encoder: Any, images: np.ndarray) -> None:
        """Checks the regions of an encoder that ends with a norm: each value differs by less than 1e-4."""
        regions, _ = self.run(encoder, images)
        with self.torch.no_grad():
            expected = self.regions(network, images).numpy()
        assert regions.shape == expected.shape
        assert np.abs(regions - expected).max() < 1e-4

    def check_grid(self, network: Any, encoder: Any, images: np.ndarray, grid: int) -> None:
        """Checks that the encoder averages the last map of the network to grid x grid regions."""
        assert encoder.region_count == grid**2
        with self.torch.no_grad():
            last = network.features(self.pixels(network, images))
        expected = self.torch.nn.functional.adaptive_avg_pool2d(last, grid).flatten(2).transpose(1, 2)
        self.close(self.run(encoder, images)[0], expected)

    def run(self, encoder: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The encoder's regions, and its logits if it has a classifier."""
        both = nnx.jit(lambda encoder, x: (encoder(x), encoder.classify(x) if encoder.classifier else None))
        regions, logits = both(encoder, images)
        return np.asarray(regions), None if logits is None else np.asarray(logits)

    def close(self, values: np.ndarray, expected: Any, tolerance: float = 1e-4) -> None:
        """Checks the relative error of the norm, and each absolute error relative to the largest value."""
        expected = expected.detach().numpy()
        assert values.shape == expected.shape
        # The comparison would prove nothing if all values were 0 or all images had the same values.
        assert (expected > 0).mean() > 0.02
        assert np.linalg.norm(expected - expected.mean(0)) > 0.01 * np.linalg.norm(expected)
        error = np.linalg.norm(values - expected) / np.linalg.norm(expected)
        assert error < tolerance
        assert np.abs(values - expected).max() < tolerance * np.abs(expected).max()

    def close_gradient(self, found: np.ndarray, expected: np.ndarray) -> None:
        """Checks that the relative error of a gradient is below 2 %.

        After many layers, rounding changes the sign of a few ReLU inputs. It depends on the machine and the number of
        threads. test_convolution.py compares the gradients of single convolutions strictly.
        """
        assert found.shape == expected.shape
        assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)

    def gradients(self, network: Any, images: np.ndarray, direction: np.ndarray) -> dict[str, np.ndarray]:
        """Gradients of sum(regions * direction) by weights and biases, keyed by their names in the state dict."""
        network.zero_grad()
        (self.regions(network, images) * self.torch.from_numpy(direction)).sum().backward()
        return {
            name: parameter.grad.numpy() for name, parameter in network.named_parameters() if parameter.grad is not None
        }


def own_gradients(encoder: Any, images: np.ndarray, direction: np.ndarray) -> dict[str, np.ndarray]:
    """The same gradients of an encoder, of its trained parameters only, by path ("stages/1/blocks/0/filter/kernel")."""

    def loss(encoder: Any, x: jax.Array) -> jax.Array:
        return (encoder(x) * direction).sum()

    found = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param)))(encoder, images)
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(found))
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="session")
def gradients_of() -> Any:
    """``own_gradients``, because test modules cannot import from here."""
    return own_gradients


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """The PyTorch networks; skips the test if PyTorch is not installed."""
    torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed (extra: torch)")
    spec = importlib.util.spec_from_file_location("torch_networks", SCRIPTS / "torch_networks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Oracle(torch, module)


# All sizes differ, so that a mistaken axis is detected.
DECODERS: dict[str, Any] = {
    "show_tell": ShowTell(hidden_size=8, embedding_size=8, dropout=0.5),
    "show_tell_tied": ShowTell(hidden_size=8, embedding_size=8, tied_embedding=True),
    "attend": ShowAttendTell(hidden_size=8, embedding_size=4, attention_size=3, region_size=7),
    "attend_as_paper": ShowAttendTell(hidden_size=8, embedding_size=4, attention_size=3, region_size=None),
    "attend_tied": ShowAttendTell(
        hidden_size=8, embedding_size=4, attention_size=3, region_size=7, gate=False, tied_embedding=True
    ),
    "att2in": Att2in(hidden_size=8, embedding_size=4, attention_size=3, region_size=7),
    "adaptive": Adaptive(hidden_size=8, embedding_size=4, attention_size=3),
    "up_down": UpDown(hidden_size=8, embedding_size=4, attention_size=3),
    "up_down_projected": UpDown(hidden_size=8, embedding_size=4, attention_size=3, region_size=7),
    "aoa": AttentionOnAttention(hidden_size=8, embedding_size=4, heads=2, refining=2),
    "aoa_unrefined": AttentionOnAttention(hidden_size=8, embedding_size=4, heads=4, refining=0),
    "transformer": Transformer(
        hidden_size=8, embedding_size=8, heads=2, layers=2, feedforward_size=5, max_length=9, tied_embedding=True
    ),
}


@pytest.fixture(scope="session")
def build_decoder() -> Any:
    """(name, dtype) -> a decoder as in ``decoder_case``, with its initial parameters."""
    return lambda name, dtype: DECODERS[name].build(6, 11, dtype=dtype, rngs=nnx.Rngs(0))


# Tests that compile much. The default run takes four decoders, which differ most: one without attention, one with soft
# attention, one with several heads, one with a cache.
COMPILING = {
    "test_teacher_forcing_and_stepping_have_equal_gradients",
    "test_bfloat16_products_train_and_decode",
    "test_scheduled_sampling_replaces_tokens_with_the_given_probability",
}
REPRESENTATIVE = {"show_tell", "attend", "aoa", "transformer"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if item.originalname in COMPILING and item.callspec.params["decoder_case"] not in REPRESENTATIVE:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", params=DECODERS)
def decoder_case(request: pytest.FixtureRequest) -> tuple[str, Decoder]:
    """(name, decoder) of each kind, for regions of size 6 and 11 words, with random biases."""
    decoder = DECODERS[request.param].build(6, 11, dtype=jnp.float32, rngs=nnx.Rngs(0))
    # Initial biases are 0, so a missing bias would go unnoticed.
    keys = iter(jax.random.split(jax.random.key(1), 200))
    state = nnx.state(decoder, nnx.Param)
    nnx.update(decoder, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), state))
    return request.param, decoder


@pytest.fixture(scope="session")
def decoder_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Regions float32 [3,5,6], and tokens int32 [3,2,7] below 11."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 5, 6)).astype(np.float32), rng.integers(1, 11, (3, 2, 7)).astype(np.int32)
