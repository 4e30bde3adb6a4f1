"""timm models with a mixpool stem: importing this module registers them, `timm.create_model("mixpool_resnet34")`.

The models are AlexNet, ResNet-18/26/34/50/101/152, ResNeXt-50/101, Wide-ResNet-50/101, SE-ResNet-50 and DenseNet-121,
under the names of timm's stock models after `mixpool_`, with the same tags (`mixpool_resnet34.tv_in1k`). Besides the
stock model's arguments every one of them takes those of `MixPoolModel`.
"""

from timm.models import register_model

from mixpool.timm_models.model import MixPoolAlexNet, MixPoolDenseNet, MixPoolModel, MixPoolResNet
from mixpool.timm_models.registry import ARCHITECTURES, PREFIX, default_cfgs, entry_point

# register_model adds the names of the models, and looks for `default_cfgs` here.
__all__ = ["MixPoolAlexNet", "MixPoolDenseNet", "MixPoolModel", "MixPoolResNet", "default_cfgs"]

for _name in ARCHITECTURES:
    globals()[PREFIX + _name] = register_model(entry_point(_name, __name__))
