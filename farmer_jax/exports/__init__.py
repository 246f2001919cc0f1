"""Exports: the weights of a run as files for other programs, and for the Hugging Face hub.

    FOLDER/
      model.safetensors     all parameters, or several files and model.safetensors.index.json
      config.json           the keys below
      README.md             the model card
      samples.png           a grid of samples, if the run has one
      torch_farmer.py       the model in PyTorch

The keys of config.json:

    model_type              'farmer'
    export_format           1
    farmer_jax_version      the version that wrote the export
    step                    of the checkpoint
    teacher_step            in the export of a distillation run: of the teacher. Otherwise None
    parameters              'ema_params' (averaged over training steps) or 'params'
    class_names             [] if they are unknown
    config                  the configuration of the run, without paths on its machine

The parameters are those of evaluation. A tensor has the path of the parameter as its name, joined
by dots, and each flow block and each layer has its own tensors. Index 0 is the block that reads the
image:

    flow.block_3.layer_1.query.kernel       [width, width]; kernels are [inputs, outputs]
    prior.informative_head.means.bias       [components · channels]
    student.block_3.shift_proj.kernel       in the export of a distillation run
"""

from farmer_jax.exports.reading import read_config as read_config
from farmer_jax.exports.reading import restore_params as restore_params
from farmer_jax.exports.writing import check_folder as check_folder
from farmer_jax.exports.writing import write as write
