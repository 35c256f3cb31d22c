"""Train a network with batch norm and dropout on handwritten digits with the Trainer, under a budget of 256 MiB."""

import brim
from brim import data, nn, optim
from brim.train import Trainer

train, test = data.load_digits()
brim.manual_seed(0)
model = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 10)
)
trainer = Trainer(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9), budget="256MiB")
trainer.fit(train, epochs=5, validation=test)
print(f"test accuracy {trainer.evaluate(test)['accuracy']:.3f}")
