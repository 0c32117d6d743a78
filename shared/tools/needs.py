"""What each recipe expects on the disk, what it is, and the command that brings it.

doctor.py reads this table; a recipe's data and weights are named here and nowhere else for it.
Paths are below the repository unless they begin with a cache: {hub}, the Hugging Face Hub's, or
{torch}, torch's own. A path may be a pattern. Commands are for a shell in the repository's root.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """One file or directory. alternatives: other places where it would do as well.

    optional: some of the recipe's commands do without it.
    """

    path: str
    what: str
    command: str
    alternatives: tuple[str, ...] = ()
    optional: bool = False


_QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
_QWEN_HERE = "vasevqa/model/models/Qwen2.5-VL-7B-Instruct"
_LLAVA = "llava-hf/llava-v1.6-mistral-7b-hf"
_RESNET50 = "resnet50-11ad3fa6.pth"
_FETCH_RESNET50 = (
    'curl -L --create-dirs -o "${TORCH_HOME:-$HOME/.cache/torch}/hub/checkpoints/'
    f'{_RESNET50}" https://download.pytorch.org/models/{_RESNET50}'
)

NEEDS: dict[str, tuple[Need, ...]] = {
    "face_distill": (
        Need(
            "face_distill/datasets/faces_emore/train.rec",
            "faces_emore (MS1M-ArcFace), or <identity>/<image> folders",
            "download faces_emore from InsightFace's list of datasets by hand, then: unzip "
            "faces_emore.zip -d face_distill/datasets",
            alternatives=("face_distill/datasets/faces_emore/*/*.jpg",),
        ),
        Need(
            "face_distill/teacher_features_12k/teacher_embedding.npy",
            "the teacher's embeddings",
            "python face_distill/extract_teacher.py --weights backbone.pth",
        ),
        Need(
            "face_distill/teacher_features_12k/teacher_feat_map.npy",
            "the teacher's feature maps",
            "python face_distill/extract_teacher.py --weights backbone.pth",
        ),
        Need(
            "face_distill/blip2_weights/*.safetensors",
            "BLIP-2's vision tower, 10 GB",
            "python face_distill/download_weight.py   (or: --source modelscope)",
        ),
        Need(
            "face_distill/datasets/faces_emore/lfw.bin",
            "pairs to verify (evaluate.py, --verify)",
            "comes with faces_emore",
            optional=True,
        ),
    ),
    "lavic": (
        Need(
            "lavic/data/item2meta_train.json",
            "the training items",
            "git clone https://github.com/jeon185/LaViC && unzip "
            "LaViC/data/item2meta_train.json.zip -d lavic/data",
        ),
        Need(
            "lavic/data/item2meta_valid.jsonl",
            "the validation items",
            "git clone https://github.com/jeon185/LaViC && cp LaViC/data/item2meta_valid.jsonl "
            "lavic/data/",
        ),
        Need(
            "lavic/data/train_images/*",
            "the training items' pictures",
            "python lavic/src/crawl_images.py --train-only",
        ),
        Need(
            "lavic/data/valid_images/*",
            "the validation items' pictures",
            "python lavic/src/crawl_images.py --valid-only",
        ),
        Need(
            "{hub}/models--llava-hf--llava-v1.6-mistral-7b-hf/snapshots/*/config.json",
            f"{_LLAVA}, 15 GB (fetched by the first run)",
            f"hf download {_LLAVA}   (or: USE_MODELSCOPE_HUB=1 for the first run)",
            optional=True,
        ),
        Need(
            "lavic/data/all_beauty/train.jsonl",
            "conversations for prompt tuning (all_beauty, amazon_fashion, amazon_home)",
            "git clone https://github.com/jeon185/LaViC && cp -r LaViC/data/all_beauty lavic/data/",
            optional=True,
        ),
    ),
    "vasevqa": (
        Need(
            "vasevqa/filter/images2/[01]/*",
            "your pictures of low (0) and high (1) quality, for the classifier",
            "sort some hundred of your pictures into vasevqa/filter/images2/0 and /1",
        ),
        Need(
            "vasevqa/filter/images/*",
            "the pictures to classify and filter",
            "put your pictures into vasevqa/filter/images",
        ),
        Need(
            f"{{torch}}/checkpoints/{_RESNET50}",
            "ResNet-50's ImageNet weights, for the classifier to begin from",
            _FETCH_RESNET50,
            alternatives=("vasevqa/filter/resnet50-*.pth",),
            optional=True,
        ),
        Need(
            "vasevqa/filter/model/*",
            "CLIP ViT-B-32 for the filters (fetched by their first run)",
            "python shared/tools/fetch_model.py timm/vit_base_patch32_clip_224.openai "
            "vasevqa/filter/model",
            alternatives=(
                "vasevqa/filter/CLIP/model/*",
                "{hub}/models--timm--vit_base_patch32_clip_224.openai/snapshots/*/*",
            ),
            optional=True,
        ),
        Need(
            f"{_QWEN_HERE}/config.json",
            f"{_QWEN}, 17 GB",
            f"python shared/tools/fetch_model.py {_QWEN} {_QWEN_HERE}   (or: with "
            "--source modelscope)",
        ),
        Need(
            "vasevqa/model/data/video_training_dataset.json",
            "questions and answers for sft.sh",
            "put your data set there; its form stands in vasevqa/README.md",
        ),
        Need(
            "vasevqa/model/data/grpo_video_dataset.json",
            "questions and solutions for grpo.sh",
            "put your data set there; its form stands in vasevqa/README.md",
        ),
    ),
    "multimodal": (
        Need(
            "multimodal/data/coco/annotations/captions_train2017.json",
            "COCO's captions",
            "python multimodal/download_datasets.py --datasets coco",
            alternatives=("multimodal/data/coco/annotations/captions_train2014.json",),
        ),
        Need(
            "multimodal/data/coco/train2017/*.jpg",
            "COCO's pictures, 25 GB",
            "python multimodal/download_datasets.py --datasets coco",
            alternatives=("multimodal/data/coco/train2014/*.jpg",),
        ),
        Need(
            "multimodal/data/clotho/clotho_captions_development.csv",
            "Clotho's captions and sounds",
            "python multimodal/download_datasets.py --datasets clotho",
        ),
        Need(
            "multimodal/data/audiocaps/train.csv",
            "AudioCaps' captions and sounds",
            "python multimodal/download_datasets.py --datasets audiocaps",
        ),
        Need(
            "multimodal/data/voxceleb/vox*_meta.csv",
            "VoxCeleb's voices and faces",
            "python multimodal/download_datasets.py --datasets voxceleb",
            optional=True,
        ),
    ),
    "arcface": (
        Need(
            "arcface/data/inshop/Eval/list_eval_partition.txt",
            "In-shop Clothes Retrieval of DeepFashion (or --data-root)",
            "ask for In-shop at mmlab.ie.cuhk.edu.hk/projects/DeepFashion, unpack it to "
            "arcface/data/inshop",
            alternatives=("arcface/data/*/Eval/list_eval_partition.txt",),
        ),
        Need(
            f"{{torch}}/checkpoints/{_RESNET50}",
            "ResNet-50's ImageNet weights (or --init random)",
            _FETCH_RESNET50,
        ),
    ),
}
