"""Judges with downloaded weights: their real code on random weights, and what is said where something is missing."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import huggingface_hub
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from recache_compile.errors import RuntimeUnavailableError
from recache_compile.evaluation import pretrained
from recache_compile.evaluation.distances import Distance, get_distance
from recache_compile.evaluation.rewards import Reward, get_reward

PROMPTS = ["a red cat", "dog", "a sentence that goes on and on and on"]


@pytest.fixture
def pictures() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lpips_distance() -> Distance:
    """LPIPS with a random backbone and the real channel weights."""
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    return Distance("lpips", pretrained.Lpips(lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP that spells its prompts, at most 16 letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder, letters = tmp_path_factory.mktemp("clip"), "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer).save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {"vocab_size": len(words), "max_position_embeddings": 16, **ends, **small}
    vision = {"image_size": 32, "patch_size": 8, **small}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    return folder


def told(get, name: str) -> str:
    """The one line that stands for a judge that cannot be had."""
    with pytest.raises(RuntimeUnavailableError) as caught:
        get(name, "some/model")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("side", [8, 30, 32, 64])
def test_lpips_judges_pictures_of_any_size(lpips_distance: Distance, side: int) -> None:
    one, other = torch.rand(2, 2, 3, side, side, generator=torch.Generator().manual_seed(0))
    assert lpips_distance(one, one.clone()).tolist() == [0.0, 0.0]
    assert lpips_distance(one, other).gt(0).all()


def test_lpips_knows_no_other_sample(lpips_distance: Distance, pictures: Tensor) -> None:
    other = pictures.flip(-1)
    alone = torch.cat([lpips_distance(pictures[[row]], other[[row]]) for row in range(3)])
    torch.testing.assert_close(lpips_distance(pictures, other), alone, rtol=1e-4, atol=1e-7)


def test_lpips_judges_a_video_by_frames(lpips_distance: Distance, pictures: Tensor) -> None:
    video = lpips_distance(pictures[None], pictures.flip(-1)[None])
    torch.testing.assert_close(video, lpips_distance(pictures, pictures.flip(-1)).mean(0, keepdim=True))


def test_lpips_reads_pictures_between_minus_one_and_one(pictures: Tensor) -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            seen.extend((one, other))
            return torch.zeros(len(one), 1, 1, 1)

    pretrained.Lpips(Spy())(pictures, pictures)
    assert all(torch.equal(batch, pictures * 2 - 1) for batch in seen)


def test_lpips_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "pip install 'recache-compile[train]'" in told(get_distance, "lpips")


def test_lpips_without_weights_says_where_they_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lpips")

    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    message = told(get_distance, "lpips")
    assert "alexnet-owt-7be5be79.pth" in message
    assert f"{tmp_path}/checkpoints" in message
    assert "no network" in message
    assert "choose distance ssim or mse" in message
    assert get_distance("auto", "some/model").name == "ssim"


def test_clip_is_loaded_and_scores_100_times_the_cosine(
    monkeypatch: pytest.MonkeyPatch, clip_folder: Path, pictures: Tensor
) -> None:
    monkeypatch.setattr(pretrained, "CLIP_WEIGHTS", str(clip_folder))
    reward = get_reward("clip", "some/model")
    scores = reward(pictures, PROMPTS)
    alone = torch.cat([reward(pictures[[row]], [PROMPTS[row]]) for row in range(3)])
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)

    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    image = Image.fromarray((pictures[0] * 255).round().byte().permute(1, 2, 0).numpy())
    with torch.no_grad():
        read = model(**processor(text=PROMPTS[:1], images=image, return_tensors="pt"))
    cosine = read.logits_per_image / model.logit_scale.exp()
    assert scores[0].item() == pytest.approx(100 * cosine.item(), rel=1e-4)


def test_clip_without_weights_names_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pretrained, "CLIP_WEIGHTS", str(tmp_path))
    message = told(get_reward, "clip")
    assert f"reward clip: the weights {tmp_path} cannot be loaded" in message
    assert "hf download" in message


class Halves(nn.Module):
    """A stand-in for an open_clip model: the mean colour, and letters counted."""

    def encode_image(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return tokens


def count_letters(prompts: list[str]) -> Tensor:
    return torch.tensor([[prompt.count(letter) for letter in "rgb"] for prompt in prompts], dtype=torch.float32)


def colour(image: Image.Image) -> Tensor:
    return torch.tensor(list(image.getpixel((0, 0)))).float()[:, None, None].expand(3, 2, 2) / 255


def test_hpsv2_scores_the_cosine_under_what_open_clip_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def create(name: str, weights: str) -> tuple[nn.Module, None, object]:
        asked.append((name, weights))
        return Halves(), None, colour

    package = SimpleNamespace(create_model_and_transforms=create, get_tokenizer=lambda name: count_letters)
    monkeypatch.setitem(sys.modules, "open_clip", package)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda folder, file: f"{folder}/{file}")
    reward = get_reward("hpsv2", "some/model")
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 4, 4)
    assert asked == [("ViT-H-14", "xswu/HPSv2/HPS_v2.1_compressed.pt")]
    assert reward(red.expand(3, 3, 4, 4), ["r", "g", "rb"]).tolist() == pytest.approx([1, 0, 0.5**0.5])


def test_imagereward_scores_each_picture_for_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(score=lambda prompt, image: len(prompt) + image.getpixel((0, 0))[0] / 255)
    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=lambda name: model))
    pictures = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 4, 4)
    assert get_reward("imagereward", "some/model")(pictures, ["aa", "b"]).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("clip", "transformers", "pip install 'recache-compile[hub]'"),
        ("hpsv2", "open_clip", "pip install 'recache-compile[rewards]'"),
        ("imagereward", "ImageReward", "pip install image-reward git+https://github.com/openai/CLIP"),
    ],
)
def test_a_reward_without_its_package_names_the_command(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, install: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = told(get_reward, name)
    assert message.startswith(f"reward {name}: ")
    assert package in message
    assert install in message


@pytest.mark.parametrize(
    ("name", "package", "weights"),
    [("hpsv2", "open_clip", "HPS_v2.1_compressed.pt"), ("imagereward", "ImageReward", "THUDM/ImageReward")],
)
def test_a_reward_without_weights_names_them(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, weights: str
) -> None:
    def offline(*names: str) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setitem(sys.modules, package, SimpleNamespace(load=offline, create_model_and_transforms=None))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    message = told(get_reward, name)
    assert f"{weights} cannot be loaded: no network at all; run `hf download" in message


def test_a_reward_takes_a_model_that_is_passed_in(pictures: Tensor) -> None:
    reward = Reward("hpsv2", pretrained.HumanPreference(Halves(), colour, count_letters))
    assert reward(pictures[None], ["rgb"]).shape == (1,)
