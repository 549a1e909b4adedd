"""The nodes ComfyUI shows. The only room that imports ComfyUI; the work is done in the library rooms."""

from comfy_api.latest import ComfyExtension, io

from . import host
from .applying import SafetyExpertsApply
from .attacking import SafetyExpertsAttack
from .checked import checked
from .comparing import SafetyExpertsCompare
from .concept_gate import SafetyExpertsConceptGate
from .evaluating import SafetyExpertsEvaluate, register_report_page
from .exchange import SafetyExpertsImportDataset, SafetyExpertsSplitDataset
from .experts import SafetyExpertsLoad, SafetyExpertsMerge, SafetyExpertsSave
from .generating import SafetyExpertsGeneratePairs
from .judging import SafetyExpertsJudge, SafetyExpertsJudgeDataset
from .pair_guard import SafetyExpertsPairGuard
from .preferences import SafetyExpertsLoadDataset, SafetyExpertsPromptPairs, SafetyExpertsRecordPair
from .prompt_guarding import SafetyExpertsCheckPrompt, SafetyExpertsTrainPromptGuard
from .protection import SafetyExpertsProtect
from .recipes import SafetyExpertsRecipe
from .reviewing import SafetyExpertsReviewDataset, register_review_page
from .safe_text import SafetyExpertsSafeTextEncode
from .training import SafetyExpertsTrain
from .verifying import SafetyExpertsTrainVerifier, SafetyExpertsVerifyImages
from .watching import register_pages
from .writing import SafetyExpertsWritePairs


class SafetyExpertsExtension(ComfyExtension):
    """The pack, as ComfyUI loads it."""

    async def on_load(self) -> None:
        host.end_with_the_command()
        register_review_page()
        register_report_page()
        register_pages()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes = [
            SafetyExpertsPromptPairs,
            SafetyExpertsWritePairs,
            SafetyExpertsGeneratePairs,
            SafetyExpertsRecordPair,
            SafetyExpertsLoadDataset,
            SafetyExpertsImportDataset,
            SafetyExpertsSplitDataset,
            SafetyExpertsJudge,
            SafetyExpertsJudgeDataset,
            SafetyExpertsReviewDataset,
            SafetyExpertsRecipe,
            SafetyExpertsTrain,
            SafetyExpertsLoad,
            SafetyExpertsMerge,
            SafetyExpertsProtect,
            SafetyExpertsConceptGate,
            SafetyExpertsApply,
            SafetyExpertsPairGuard,
            SafetyExpertsSafeTextEncode,
            SafetyExpertsTrainPromptGuard,
            SafetyExpertsCheckPrompt,
            SafetyExpertsTrainVerifier,
            SafetyExpertsVerifyImages,
            SafetyExpertsSave,
            SafetyExpertsEvaluate,
            SafetyExpertsAttack,
            SafetyExpertsCompare,
        ]
        return [checked(node) for node in nodes]
