"""How an exception is told to the user."""

from torch.utils.data import DataLoader

from shared.errors import USER_ERROR, UserError
from shared.outcome import failure_of


class _Corrupt:
    """A data set whose only image cannot be read."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise UserError("faces/1.jpg: the image is corrupt;\nfetch it again")


def test_a_mistake_met_in_a_loader_worker_is_the_same_line_as_without_workers():
    for workers in (0, 1):
        try:
            next(iter(DataLoader(_Corrupt(), num_workers=workers)))
        except UserError as error:
            failure = failure_of(error)
        assert failure.message == "faces/1.jpg: the image is corrupt; fetch it again"
        assert (failure.kind, failure.code) == ("user", USER_ERROR)
