//! One normaliser a step: however the samples of a step are cut into packs, loss and gradients are the
//! same.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::path::Path;
use std::sync::Arc;

use sail_data::{Pack, Sample, read_samples};
use sail_train::config::{self, Config, VisualShape};
use sail_train::session::Session;
use sail_train::step::Step;
use sail_train::world::World;

fn loss_and_norm(session: &mut Session, packs: &[&[Sample]]) -> (f64, f64) {
    let step = Step::alone(packs.iter().map(|samples| Pack::collate(samples)).collect());
    let loss = session.accumulate(&step).unwrap();
    let verdict = session.agree(&loss, false, false).unwrap();
    session.optimizer.discard();
    (verdict.loss, verdict.grad_norm)
}

#[test]
fn unequal_packs_give_what_one_pack_gives() {
    std::env::set_current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let sets = [format!("run.root={}", dir.path().display()), "optimizer.clip_norm=null".to_owned()];
    let Config::Stage(plan) = config::load("configs/tiny/stage1.yaml".as_ref(), &sets).unwrap() else {
        panic!("a stage");
    };
    let mut session = Session::build(&plan, &Arc::new(World::alone()), None).unwrap();
    let spec = plan.eval_spec(VisualShape { tokens_per_tile: 16, unit_px: 28 }).unwrap();
    let mut samples = read_samples(&spec, &session.encoder, Some(6)).unwrap();
    samples.sort_by_key(Sample::answer_tokens);

    let (loss, norm) = loss_and_norm(&mut session, &[&samples]);
    let (cut_loss, cut_norm) = loss_and_norm(&mut session, &[&samples[..1], &samples[1..]]);
    assert!((loss - cut_loss).abs() < 1e-5 * loss, "{loss} {cut_loss}");
    assert!((norm - cut_norm).abs() < 1e-4 * norm, "{norm} {cut_norm}");

    // The packs differ in their own means, or the comparison would say nothing.
    let means = [&samples[..1], &samples[1..]].map(|part| loss_and_norm(&mut session, &[part]).0);
    assert!((means[0] - means[1]).abs() > 1e-3 * loss, "{means:?}");
}
