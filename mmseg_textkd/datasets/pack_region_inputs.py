# Copyright (c) mmseg_textkd contributors. All rights reserved.
from mmengine.structures import InstanceData
from mmseg.datasets.transforms import PackSegInputs
from mmseg.registry import TRANSFORMS


@TRANSFORMS.register_module()
class PackRegionInputs(PackSegInputs):
    """``PackSegInputs`` that packs region embeddings too.

    The data sample gets ``region_embeddings``, an :obj:`InstanceData` with
    ``labels``, shape (R, ), and ``vectors``, shape (R, D), which moves to the
    device with the labels.

    Args:
        meta_keys (Sequence[str]): See ``PackSegInputs``.
    """

    def transform(self, results: dict) -> dict:
        """Pack one sample.

        Args:
            results (dict): Result dict of the pipeline, which
                :class:`LoadRegionEmbeddings` has gone through.

        Returns:
            dict: ``inputs`` and ``data_samples``.

        Raises:
            KeyError: If there are no region embeddings.
        """
        if 'region_embeddings' not in results:
            raise KeyError('PackRegionInputs found no `region_embeddings`: '
                           'put LoadRegionEmbeddings behind LoadAnnotations '
                           'in the pipeline.')
        packed = super().transform(results)
        regions = results['region_embeddings']
        packed['data_samples'].region_embeddings = InstanceData(
            **regions._asdict())
        return packed
