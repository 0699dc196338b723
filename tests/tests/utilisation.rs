//! Operations of the packs of a step, which model FLOPs utilisation is made of, against sums written by hand for the
//! tiny models.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use sail_data::Pack;
use sail_train::config::{self, Config, Module};
use sail_train::session::Session;
use sail_train::world::World;

const TEXT: &str = r#"data.sources=[{name: text, shards: "data/demo/text-train-*.tar"}]"#;

/// Steps of the tiny stage with these settings, each by its packs and what is counted for it.
fn counted(sets: &[&str]) -> Vec<(Vec<Pack>, BTreeMap<Module, u64>)> {
    std::env::set_current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let root = format!("run.root={}", dir.path().display());
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).chain([root]).collect();
    let Config::Stage(plan) = config::load("configs/tiny/stage1.yaml".as_ref(), &sets).unwrap() else {
        panic!("a stage");
    };
    let mut session = Session::build(&plan, &Arc::new(World::alone()), None).unwrap();
    let mut step = || session.next_step().unwrap().unwrap();
    (0..4).map(|_| step()).map(|step| (step.packs, step.all.flops)).collect()
}

/// How often a part is computed: in the forward pass, and for each of the gradients that are wanted as often.
#[derive(Clone, Copy)]
struct Times {
    patches: u64,
    vision: u64,
    projector: u64,
    llm: u64,
    attention: u64,
}

/// An encoder of 6 layers, width 192 and 512 inside, whose images have 64 patches of 588 values and become 16 tokens of 768; a
/// decoder of 4 layers, width 256 and 768 inside, with 2 of 4 heads of width 64 for keys and values, and 2048 tokens.
fn by_hand(packs: &[Pack], times: Times) -> [u64; 3] {
    let sum = |of: fn(&Pack) -> u64| packs.iter().map(of).sum::<u64>();
    let images = sum(|pack| pack.images.len() as u64);
    let pairs = sum(|pack| {
        let lengths = pack.cu_seqlens.windows(2).map(|ends| (ends[1] - ends[0]) as u64);
        lengths.map(|length| length * (length + 1) / 2).sum()
    });
    let (tokens, targets) = (sum(|pack| pack.ids.len() as u64), sum(|pack| pack.answer_tokens() as u64));
    let vision_linear = 6 * 2 * 64 * (4 * 192 * 192 + 3 * 192 * 512);
    let vision_attention = 6 * 4 * 64 * 64 * 192;
    let vision =
        images * (times.patches * 2 * 64 * 588 * 192 + times.vision * (vision_linear + vision_attention));
    let projector = times.projector * images * 2 * 16 * (768 * 256 + 256 * 256);
    let linear = tokens * 4 * 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768) + targets * 2 * 256 * 2048;
    [vision, projector, times.llm * linear + times.attention * pairs * 4 * 4 * 256]
}

fn check(what: &str, sets: &[&str], times: Times, with_images: bool) {
    for (packs, flops) in counted(sets) {
        assert_eq!(packs.iter().any(|pack| !pack.images.is_empty()), with_images, "{what}");
        let found = Module::ALL.map(|module| flops[&module]);
        assert_eq!(found, by_hand(&packs, times), "{what}");
        assert!(found[2] > 0, "{what}");
    }
}

#[test]
fn steps_count_what_is_computed_by_hand() {
    let train = |vision, llm| format!("train={{vision: {vision}, projector: {{lr: 1e-3}}, llm: {llm}}}");
    let all = train("{lr: 1e-3}", "{lr: 1e-3}");
    let times = Times { patches: 2, vision: 3, projector: 3, llm: 3, attention: 3 };
    check("everything", &[&all], times, true);
    // Computing again is no work of the model.
    check("recomputed", &[&all, "batch.recompute={vision: block, llm: block}"], times, true);
    check("text", &[&all, TEXT, "data.balance=off"], times, false);
    // Gradients pass through a frozen language model.
    let frozen = Times { patches: 1, vision: 1, llm: 2, ..times };
    check("the connector", &[&train("frozen", "frozen")], frozen, true);
    check("vision", &[&train("{lr: 1e-3}", "frozen")], Times { llm: 2, ..times }, true);
    // Nothing that is trained is reached.
    let forward = Times { llm: 1, attention: 1, ..frozen };
    check(
        "text through what is frozen",
        &[&train("frozen", "frozen"), TEXT, "data.balance=off"],
        forward,
        false,
    );
}
