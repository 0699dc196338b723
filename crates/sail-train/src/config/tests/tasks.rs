//! Files of tasks: what a good one resolves to, and every message about a bad one.

use std::fs;

use super::super::tasks::{AttentivePlan, ImagesPlan, KnnPlan, MlpPlan, load_tasks};

fn faults(text: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tasks.yaml");
    fs::write(&file, text).unwrap();
    let errors = load_tasks(&file).expect_err("the file is bad");
    errors.to_string().replace(&format!("{}/", folder.path().display()), "")
}

#[test]
fn what_is_left_out_has_the_values_of_the_paper() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tasks.yaml");
    let text = "
recognition:
  - name: imagenet
    train: { shards: \"train-{0..9}.tar\" }
    tests:
      - { name: val, folder: val }
      - { name: a, folder: imagenet-a, own_classes: true }
    mlp: {}
    knn: { k: 5 }
    attentive: { heads: 16 }
affinity:
  - { name: words, shards: [a.tar, b.tar] }
";
    fs::write(&file, text).unwrap();
    let plan = load_tasks(&file).unwrap();
    let recognition = &plan.recognition[0];
    assert_eq!(recognition.train, ImagesPlan::Shards(vec!["train-{0..9}.tar".to_owned()]));
    assert_eq!(recognition.tests.iter().map(|test| test.own_classes).collect::<Vec<_>>(), [false, true]);
    assert_eq!(recognition.mlp, Some(MlpPlan { hidden: 2048, epochs: 10, lr: 1e-3, batch: 256 }));
    let attentive = AttentivePlan { heads: 16, epochs: 10, lr: 1e-3, batch: 256 };
    assert_eq!(recognition.attentive, Some(attentive));
    assert_eq!(recognition.knn, Some(KnnPlan { k: 5, temperature: 0.07 }));
    assert_eq!((plan.affinity[0].images, plan.affinity[0].points), (5, 1024));
}

#[test]
fn every_fault_is_told_at_once_with_its_line() {
    let text = "
batch_images: 0
sede: 1
recognition:
  - name: a/b
    train: { folder: x, shards: y.tar }
    tests: []
  - train: {}
    tests:
      - { name: train, folder: x }
      - { name: val, folder: x, own_clases: true }
    knn: { k: 0, temperature: -1 }
    mlp: { hidden: 0, epochs: 0, lr: 0, batch: many }
    attentive: { heads: 0, epochs: 0, lr: -1, batch: 0 }
affinity:
  - { name: same, shards: a.tar, images: 0, points: 2 }
  - { name: same }
loss:
  - { name: l, samples: 0, tokens_per_pack: 0, layout: captons }
generation:
  - { name: g, shards: g.tar, max_new_tokens: 0 }
choice:
  - { name: c, shards: c.tar, choices: [yes, \"yes\"] }
";
    insta::assert_snapshot!(faults(text));
}

#[test]
fn a_file_without_a_task_and_one_that_is_not_there() {
    insta::assert_snapshot!(faults("seed: 1"));
    let errors = load_tasks("no/such/tasks.yaml".as_ref()).unwrap_err().to_string();
    assert!(
        errors.contains("`no/such/tasks.yaml` cannot be read") && errors.contains("--> --tasks"),
        "{errors}"
    );
}
