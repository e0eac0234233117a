from llmc_attnmask.runlog.lock import FolderLock


def test_a_folder_is_held_by_one_lock_until_it_is_released(tmp_path):
    first, second = FolderLock(), FolderLock()
    assert first.take(tmp_path) and first.held
    assert not second.take(tmp_path) and not second.held
    first.release()
    assert not first.held
    assert second.take(tmp_path) and second.held
    second.release()
