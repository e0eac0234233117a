from llmc_attnmask.text import pydoc


def test_builtin_splits_share_no_document_and_are_stable():
    calibration = pydoc.documents("calibration")
    evaluation = pydoc.documents("evaluation")
    assert len(calibration) > 200 and len(evaluation) > 20
    assert not set(calibration) & set(evaluation)
    pydoc.documents.cache_clear()
    assert pydoc.documents("evaluation") == evaluation
