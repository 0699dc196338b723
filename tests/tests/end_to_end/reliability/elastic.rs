//! One run on 1, 2, 4 and again 1 ranks, each time with another strategy, is that of one rank.

use super::{assert_same_data, job};
use crate::parallel::assert_close;

#[test]
fn a_run_goes_through_changing_numbers_of_ranks() {
    let sets = [super::ALL, "batch.packs_per_step=4", "data.streams=4", "schedule.steps=8"];
    let straight = job(&sets);
    straight.run(straight.alone(), 0);
    let mut elastic = job(&sets);
    let parts = [(1, "ddp", Some("2")), (2, "zero1", Some("4")), (4, "zero2", Some("6")), (1, "zero1", None)];
    for (ranks, strategy, stop_at) in parts {
        elastic.set(&[&format!("parallel.strategy={strategy}")]);
        let mut command = elastic.launch(ranks);
        if let Some(step) = stop_at {
            command.args(["--stop-at", step]);
        }
        elastic.run(command, if stop_at.is_some() { 3 } else { 0 });
    }
    assert_same_data("1, 2, 4, 1 ranks", &elastic, &straight);
    assert_close("1, 2, 4, 1 ranks", &elastic, &straight);
}
