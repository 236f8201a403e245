"""Networks that classify texts ``[B, L]``, given as numbers of words or characters with 0 as padding."""

from torch import Tensor, nn

from fedlight.written import Remembers


class CharLSTM(Remembers, nn.Module):
    """The network for Shakespeare of LEAF and of McMahan et al. (AISTATS 2017): which character comes next?

    An embedding, LSTM layers, and a dense layer on what the last of them says at the end of the text. 819,920
    parameters for 80 characters and classes.

    Args:
        num_classes: logits.
        vocab_size: one more than the largest number in a text; ``data.vocab_size``.
        embedding_dim: D, numbers of a character.
        hidden_size: units of a layer.
        num_layers: LSTM layers.
    """

    def __init__(
        self, num_classes: int, vocab_size: int, embedding_dim: int = 8, hidden_size: int = 256, num_layers: int = 2
    ) -> None:
        super().__init__()
        self.embedding, self.vocab_size = nn.Embedding(vocab_size, embedding_dim), vocab_size
        self.lstm = nn.LSTM(embedding_dim, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of texts ``[B, L]``."""
        said: Tensor = self.lstm(self.embedding(ids))[0]
        last = ((ids != 0).sum(1) - 1).clamp(min=0)[:, None, None].expand(-1, -1, said.shape[2])
        logits: Tensor = self.fc(said.gather(1, last)[:, 0])
        return logits


class TextMLP(Remembers, nn.Module):
    """A dense network on the mean of a text's vectors (Iyyer et al., ACL 2015), for labels of words.

    Args:
        num_classes: logits.
        vocab_size: one more than the largest number in a text; ``data.vocab_size``.
        embedding_dim: D, numbers of a word.
        hidden_size: units of the hidden layer, which ends in a ReLU.
    """

    def __init__(self, num_classes: int, vocab_size: int, embedding_dim: int = 64, hidden_size: int = 64) -> None:
        super().__init__()
        self.embedding, self.vocab_size = nn.Embedding(vocab_size, embedding_dim), vocab_size
        self.fc1, self.relu1 = nn.Linear(embedding_dim, hidden_size), nn.ReLU()
        self.fc2 = nn.Linear(hidden_size, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of texts ``[B, L]``."""
        is_text = (ids != 0).unsqueeze(2)
        mean = (self.embedding(ids) * is_text).sum(1) / is_text.sum(1).clamp(min=1)
        logits: Tensor = self.fc2(self.relu1(self.fc1(mean)))
        return logits
