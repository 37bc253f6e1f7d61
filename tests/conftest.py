"""Fixtures that several folders of tests use: Turkish text, a small tokenizer, the shared data where it is present."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from lowvram.hardware.detect import find_card
from tests.sweeps import mark_rest

if find_card() is None:
    # Read when Triton is imported: without a card its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
else:
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)  # as lowvram does where it chooses its device

# A shell that starts tests in the background has them ignore Ctrl-C, and every process that they start with them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# And those under nohup SIGHUP, which their children would inherit.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A commit has one verdict: what is generated follows from the test, not from the moment.
settings.register_profile("one verdict", derandomize=True)
settings.load_profile("one verdict")

TURKISH = (
    "Ankara'da sabah erkenden yola çıktık; hava serindi, gökyüzü ise bulutsuzdu.",
    "Annem mutfakta çay demlerken babam gazetenin bulmacasını çözüyordu.",
    "Iğdır'ın kayısısı, Isparta'nın gülü, Rize'nin çayı meşhurdur.",
    "İzmir'deki evimizin bahçesinde üç incir ağacı ve yaşlı bir kedi vardı.",
    "Öğretmenimiz bize büyük ünlü uyumunu anlattı: kitaplar, evler, gözlükler, kuşlar.",
    "Yağmur dinince çocuklar sokağa koştular; su birikintilerinde gemiler yüzdürdüler.",
    "“Gelecek misin?” diye sordu. “Bilmiyorum,” dedim, “belki yarın gelirim.”",
    "Trenin 14.35'te kalkacağını duyunca koşmaya başladık ama yetişemedik.",
    "Şükrü Bey'in dükkânında hâlâ eski usul terazi kullanılıyordu.",
    "Denizin kokusu, martıların sesi ve simitçinin çağrısı birbirine karışıyordu.",
    "Çekoslovakyalılaştıramadıklarımızdan mısınız diye gülerek sordu dilbilimci.",
    "Kış geldiğinde köyün yolları kapanır, haberler radyodan dinlenirdi.",
    "Kütüphaneden aldığım kitapları geri götürmeyi unuttuğum için ceza ödedim.",
    "Ağaçların arasından süzülen ışık, ırmağın üzerinde ışıldıyordu.",
    "Doktor, günde iki litre su içmemi ve tuzu azaltmamı söyledi.",
    "Pazardan domates, salatalık, biber, maydanoz ve yarım kilo peynir aldık.",
)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process a core, up to eight; one alone where a card, or gigabytes of memory, are to be had once."""
    expression = config.option.markexpr
    is_shared = expression != "nightly" and ("not gpu" not in expression or "not heavy" not in expression)
    return 0 if is_shared else min(os.cpu_count() or 1, 8)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the rest of long sweeps as nightly, and refuse a name that is another one in each process.

    Processes with other names would not agree on which tests there are.
    """
    mark_rest(items)
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if unstable:
        raise pytest.UsageError(f"Give the parameters of {unstable[0]} ids.")


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> None:
    """Take what lives before a file of tests out of garbage collection.

    A command collects garbage before it loads a model. Over the million objects of torch and of the tests' own modules
    that takes 0.3 s each time, more than half of all that a test of `chat` computes.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Each test draws the same random tensors, whichever tests ran before it in its process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> Iterator[None]:
    """One thread: tiny tensors gain nothing from two, and threads that spin on a busy machine cost minutes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def unwritten_memory() -> Iterator[None]:
    """With LOWVRAM_TEST_NAN=1 what torch.empty returns is NaN, so that a test which reads unwritten memory fails.

    It is not always so, because torch ties it to its deterministic algorithms, which are not those that users run.
    """
    import torch

    if os.environ.get("LOWVRAM_TEST_NAN") == "1":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes what was measured on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
            patch.setenv(name, str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True, scope="session")
def processor_without_bf16() -> Iterator[None]:
    """Models are read in fp32 where no precision is asked for, whatever the processor of the machine multiplies.

    In bf16 a text that is read at once and one that is read turn by turn may differ in their last bits, hence in words.
    LOWVRAM_TEST_BF16=1 or 0 has every detection of bf16 answer yes or no, for a run of the tests on purpose.
    """
    asked = os.environ.get("LOWVRAM_TEST_BF16", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowvram.api.loading.multiplies_bf16", lambda: asked == "1")
        if asked:
            import torch

            from lowvram.generate.processor import Pace

            # What is faster there must not follow from a measurement under the load of the tests.
            pace = Pace(processor="any", torch=torch.__version__, fp32_s=2.0, bf16_s=1.0, int8_s=3.0)
            patch.setattr("lowvram.generate.processor.find_pace", lambda *_: (pace, False))
            for name in ("lowvram.model.linear.is_slow_in_half", "lowvram.generate.decoder.is_slow_in_half"):
                patch.setattr(name, lambda x: asked == "0" and x.dtype != torch.float32 and x.device.type == "cpu")
        yield


@pytest.fixture(scope="session")
def turkish() -> tuple[str, ...]:
    """Sixteen documents, written for these tests."""
    return TURKISH


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A tokenizer of some 500 ids, trained on the Turkish sentences above."""
    from lowvram.data.tokenizer import train_tokenizer

    return train_tokenizer(iter(TURKISH), 512, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text beside the repository; a test that asks for it is skipped where there is none."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data, which is not here")
    return folder
