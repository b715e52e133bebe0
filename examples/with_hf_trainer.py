"""Digits with Hugging Face's Trainer: large batches in the memory of small ones. --resume goes on from a checkpoint."""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from roadmap_ext import CachedLoss, RoadmapLoss
from roadmap_ext.data import PerClassBatchSampler
from roadmap_ext.metrics import retrieval_metrics


class RetrievalTrainer(Trainer):
    def get_train_dataloader(self):
        labels = [item["labels"] for item in self.train_dataset]
        sampler = PerClassBatchSampler(labels, 16, self.args.train_batch_size, self.args.seed)
        return self.accelerator.prepare(  # which gives each process its own batches
            DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = RoadmapLoss(gather_across_devices=self.accelerator.num_processes > 1)
        if model.training:  # the backward of the loss, which the trainer calls, runs the model again
            return CachedLoss(model, loss, mini_batch_size=40)(inputs["pixels"], inputs["labels"])
        embeddings = model(inputs["pixels"])
        return loss(embeddings, inputs["labels"]), {"embeddings": embeddings}


def main(steps=20, out=Path("runs/hf_trainer"), resume=False):
    pixels, labels = load_digits(return_X_y=True)
    items = [{"pixels": x, "labels": y} for x, y in zip(torch.tensor(pixels).float() / 16, labels, strict=True)]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32))
    settings = {
        "per_device_train_batch_size": 160,
        "per_device_eval_batch_size": 100,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }
    settings |= {"max_steps": steps, "save_steps": 10, "label_names": ["labels"], "remove_unused_columns": False}
    trainer = RetrievalTrainer(
        network,
        TrainingArguments(out, **settings),
        train_dataset=items[:1200],
        eval_dataset=items[1200:],
        compute_metrics=lambda output: retrieval_metrics(output.predictions, output.label_ids, k=(1, 10)),
    )
    trainer.train(resume_from_checkpoint=resume)
    return network, trainer.evaluate()


if __name__ == "__main__":
    print(main(resume="--resume" in sys.argv)[1])
