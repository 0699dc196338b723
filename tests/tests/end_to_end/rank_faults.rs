//! A rank that is killed, stopped, stuck, absent, wrong or alone with an error: the others end in time, say which
//! one it was, and none is left.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::processes::{Job, Process, all_end, signal, steps, together, until};
use crate::{root, run, shard_server};

/// `parallel.timeout_secs`.
const TIMEOUT_SECS: u64 = 4;
/// Until when everything has ended.
const WITHIN: Duration = Duration::from_secs(TIMEOUT_SECS + 10);

/// Small steps, and little patience once the first one is done.
fn job(sets: &[&str]) -> Job {
    let timeout = format!("parallel.timeout_secs={TIMEOUT_SECS}");
    let mut job = Job::new(&["batch.tokens_per_pack=128", "parallel.bucket_mb=1", &timeout]);
    job.set(&["parallel.first_step_timeout_secs=40", "schedule.steps=100000"]);
    job.set(sets);
    job
}

const TWO: [&str; 2] = ["batch.packs_per_step=2", "data.streams=2"];
const THREE: [&str; 2] = ["batch.packs_per_step=3", "data.streams=3"];

/// All have ended in time, with this code, and said these words; what they said is there for more.
fn ended(what: &str, processes: &mut [Process], since: Instant, code: i32, words: &[&str]) {
    let took = all_end(processes, since, WITHIN);
    println!("{what}: the last one ended after {:.1} s", took.as_secs_f64());
    for process in processes {
        let said = process.said();
        println!("--- {what}: {}, code {}\n{said}", process.name, process.code());
        assert_eq!(process.code(), code, "{what}: {} said\n{said}", process.name);
        for word in words {
            assert!(said.contains(word), "{what}: {} does not say `{word}`:\n{said}", process.name);
        }
    }
}

fn nobody_is_left(what: &str, job: &Job) {
    assert!(job.left().is_empty(), "{what}: still there: {:?}", job.left());
}

fn host() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_owned()
}

#[test]
fn a_rank_that_dies_or_stops_is_named() {
    together(&[
        ("killed", killed),
        ("killed under launch", killed_under_launch),
        ("rank 0 killed", rank_0_killed),
        ("stopped", stopped),
        ("rank 0 stopped", rank_0_stopped),
        ("stopped under launch", stopped_under_launch),
        ("rank 0 stopped under launch", rank_0_stopped_under_launch),
    ]);
}

/// While gradients of many buckets leave from hooks.
fn killed() {
    let all = "train={vision: {lr: 1e-4}, projector: {lr: 1e-4}, llm: {lr: 1e-4}}";
    let job = job(&[&THREE[..], &[all, "parallel.strategy=zero2"]].concat());
    let mut ranks = job.start_ranks(3);
    job.wait_for_step(2, &mut ranks);
    let since = Instant::now();
    signal("KILL", ranks[1].pid());
    all_end(&mut ranks[1..2], since, WITHIN);
    let victim = ranks.remove(1);
    assert_eq!(victim.code(), 137);
    ended("killed", &mut ranks, since, 1, &[&format!("rank 1 on {}", host()), "hint:"]);
    nobody_is_left("killed", &job);
}

fn killed_under_launch() {
    let job = job(&TWO);
    let mut launcher = [job.start("launch", job.launch(2))];
    job.wait_for_step(2, &mut launcher);
    let since = Instant::now();
    signal("KILL", launcher[0].pid_of_rank(1).unwrap());
    let words = [
        "rank 1 failed first: ended by SIGKILL",
        &format!("[rank 0] error: no sign of life from rank 1 on {}", host()),
    ];
    ended("killed under launch", &mut launcher, since, 137, &words);
    nobody_is_left("killed under launch", &job);
}

/// Without a launcher the store goes with rank 0.
fn rank_0_killed() {
    let job = job(&THREE);
    let mut ranks = job.start_ranks(3);
    job.wait_for_step(2, &mut ranks);
    let since = Instant::now();
    signal("KILL", ranks[0].pid());
    all_end(&mut ranks[..1], since, WITHIN);
    ended("rank 0 killed", &mut ranks[1..], since, 1, &[&format!("rank 0 on {}", host()), "hint:"]);
    nobody_is_left("rank 0 killed", &job);
}

fn stopped() {
    stop_one("stopped", 1);
}

fn rank_0_stopped() {
    stop_one("rank 0 stopped", 0);
}

/// The stopped process is the only one left, and ends by itself once it goes on.
fn stop_one(what: &str, rank: usize) {
    let job = job(&THREE);
    let mut ranks = job.start_ranks(3);
    job.wait_for_step(2, &mut ranks);
    let mut victim = [ranks.remove(rank)];
    let since = Instant::now();
    signal("STOP", victim[0].pid());
    ended(what, &mut ranks, since, 1, &[&format!("rank {rank} on {}", host()), "hint:"]);
    assert_eq!(job.left(), [victim[0].pid()], "{what}");
    let since = Instant::now();
    signal("CONT", victim[0].pid());
    ended(what, &mut victim, since, 1, &["hint:"]);
}

fn stopped_under_launch() {
    stop_one_under_launch("stopped under launch", 1);
}

fn rank_0_stopped_under_launch() {
    stop_one_under_launch("rank 0 stopped under launch", 0);
}

fn stop_one_under_launch(what: &str, rank: usize) {
    let job = job(&TWO);
    let mut launcher = [job.start("launch", job.launch(2))];
    job.wait_for_step(2, &mut launcher);
    let since = Instant::now();
    signal("STOP", launcher[0].pid_of_rank(rank).unwrap());
    let other = 1 - rank;
    let words = [
        &format!("[rank {other}] error: no sign of life from rank {rank} on {}", host()),
        &format!("rank {other} failed first: exit code 1"),
        &format!("rank {rank} did not end: killed"),
    ];
    ended(what, &mut launcher, since, 1, &words.map(String::as_str));
    nobody_is_left(what, &job);
}

#[test]
fn ranks_that_cannot_work_together_end_with_the_reason() {
    together(&[
        ("a port in use", port_in_use),
        ("another world", another_world),
        ("the same rank twice", same_rank_twice),
        ("another plan", another_plan),
        ("other weights", other_weights),
        ("a rank that does not come", absent),
        ("rank 0 stopped while all meet", stopped_while_meeting),
    ]);
}

/// Once all look for the others: many processes that start at once take seconds until then.
fn when_they_meet(ranks: &mut [Process]) -> Instant {
    for rank in ranks {
        until("a rank meets the others", || rank.has_ended() || rank.has_thread("sail-watch"));
    }
    Instant::now()
}

fn port_in_use() {
    let job = job(&[&TWO[..], &["parallel.first_step_timeout_secs=4"]].concat());
    let _taken = TcpListener::bind(("0.0.0.0", job.port())).unwrap();
    let since = Instant::now();
    let mut ranks = job.start_ranks(2);
    let port = job.port().to_string();
    ended("a port in use, rank 0", &mut ranks[..1], since, 1, &[&port, "is in use", "MASTER_PORT"]);
    // It finds somebody who does not answer.
    ended("a port in use, rank 1", &mut ranks[1..], Instant::now(), 1, &[&port, "hint:"]);
    nobody_is_left("a port in use", &job);
}

fn another_world() {
    for (wrong, shown) in [
        (1, "rank 1 on HOST was started as one of 3 ranks, rank 0 as one of 2"),
        (0, "rank 1 on HOST was started as one of 2 ranks, rank 0 as one of 3"),
    ] {
        let job = job(&[&TWO[..], &["parallel.first_step_timeout_secs=10"]].concat());
        let size = |rank| if rank == wrong { 3 } else { 2 };
        let since = Instant::now();
        let start = |rank| job.start(&format!("rank-{rank}"), job.rank(rank, size(rank)));
        let mut ranks = [0, 1].map(start);
        let shown = shown.replace("HOST", &host());
        ended("another world", &mut ranks, since, 2, &[&shown, "hint:"]);
        nobody_is_left("another world", &job);
    }
}

fn same_rank_twice() {
    let job = job(&[&THREE[..], &["parallel.first_step_timeout_secs=20"]].concat());
    let start = |(name, rank)| job.start(name, job.rank(rank, 3));
    let mut ranks = [("0", 0), ("1", 1), ("1 again", 1)].map(start);
    let since = when_they_meet(&mut ranks);
    ended("the same rank twice", &mut ranks, since, 2, &["rank 1 is there twice", &host(), "hint:"]);
    nobody_is_left("the same rank twice", &job);
}

fn another_plan() {
    for (set, path) in [("optimizer.eps=1e-6", "`optimizer.eps`"), ("run.dir=elsewhere", "`run.dir`")] {
        let job = job(&THREE);
        let since = Instant::now();
        let start = |rank| {
            let mut command = job.rank(rank, 3);
            if rank == 2 {
                command.args(["--set", set]);
            }
            job.start(&format!("rank-{rank}"), command)
        };
        let mut ranks = [0, 1, 2].map(start);
        let words = [&format!("rank 2 on {} differs from rank 0", host()), path];
        ended("another plan", &mut ranks, since, 2, &words);
        nobody_is_left("another plan", &job);
    }
}

fn other_weights() {
    let dir = tempfile::tempdir().unwrap();
    let folders = ["one", "other"].map(|name| view(dir.path(), name));
    let llm = language_model(dir.path(), &[]);
    copy(&llm, &folders[0].join("llm"));
    copy(&llm, &folders[1].join("llm"));
    let weights = folders[1].join("llm/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();

    let job = job(&[&TWO[..], &["model.llm={from: llm}"]].concat());
    let since = Instant::now();
    let start = |rank: usize| {
        let mut command = job.rank(rank, 2);
        command.current_dir(&folders[rank]);
        job.start(&format!("rank-{rank}"), command)
    };
    let mut ranks = [0, 1].map(start);
    let words = [&format!("rank 1 on {} differs from rank 0", host()), "`weights of llm`"];
    ended("other weights", &mut ranks, since, 2, &words);
    nobody_is_left("other weights", &job);
}

fn absent() {
    let job = job(&[&THREE[..], &["parallel.first_step_timeout_secs=4"]].concat());
    let mut ranks = [0, 1].map(|rank| job.start(&format!("rank-{rank}"), job.rank(rank, 3)));
    let since = when_they_meet(&mut ranks);
    let words = ["1 of 3 ranks did not come within 4 s: rank 2", "`parallel.first_step_timeout_secs`"];
    ended("absent", &mut ranks, since, 1, &words);
    nobody_is_left("absent", &job);
}

fn stopped_while_meeting() {
    let job = job(&[&THREE[..], &["parallel.first_step_timeout_secs=4"]].concat());
    let first = job.start("rank-0", job.rank(0, 3));
    until("the store is served", || std::net::TcpStream::connect(("127.0.0.1", job.port())).is_ok());
    signal("STOP", first.pid());
    let mut ranks = [1, 2].map(|rank| job.start(&format!("rank-{rank}"), job.rank(rank, 3)));
    let since = when_they_meet(&mut ranks);
    ended("stopped while meeting", &mut ranks, since, 1, &["rank 0", &job.port().to_string(), "hint:"]);
}

#[test]
fn a_rank_alone_with_a_fault_ends_all_with_its_reason() {
    together(&[
        ("waiting for data", waiting_for_data),
        ("a broken shard", broken_shard),
        ("a missing shard", missing_shard),
        ("not a number", not_a_number),
        ("asked to stop", asked_to_stop),
    ]);
}

/// One rank reads a shard of which the rest never comes.
fn waiting_for_data() {
    let shards =
        ["000000", "000001", "000002"].map(|n| root().join(format!("data/demo/caption-train-{n}.tar")));
    let server = shard_server::start(&shards, 300_000);
    let sources = format!("data.sources=[{{name: web, shards: \"{server}/{{0..2}}.tar\"}}]");
    let job =
        job(&[&THREE[..], &[&sources, "data.store.read_ahead_bytes=1", "data.shuffle_buffer=8"]].concat());
    let mut ranks = job.start_ranks(3);
    until("a rank ends", || ranks.iter_mut().any(Process::has_ended));
    let last = steps(&job.run_dir()).len();
    let about = fs::metadata(job.run_dir().join("metrics.jsonl")).unwrap();
    let since = Instant::now().checked_sub(about.modified().unwrap().elapsed().unwrap()).unwrap();
    let place = format!("is still at step {}, waiting for data", last + 1);
    ended("waiting for data", &mut ranks, since, 1, &[&place, "hint:"]);
    // All mean the same one, which none of the two that wait is.
    let named =
        |rank: &Process| rank.said().lines().find_map(|line| Some(line[..line.find(&place)?].to_owned()));
    let named: Vec<String> = ranks.iter().filter_map(named).collect();
    assert!(
        named.iter().all(|name| name.ends_with(&format!("on {} ", host())) && *name == named[0]),
        "{named:?}"
    );
    nobody_is_left("waiting for data", &job);
}

/// It meets the broken shard after some steps.
fn broken_shard() {
    let dir = tempfile::tempdir().unwrap();
    let (job, mut ranks) = one_sees(dir.path(), |view| fs::write(view.join("rare.tar"), [7; 2000]).unwrap());
    until("a rank fails", || ranks[2].has_ended());
    let since = Instant::now();
    ended("a broken shard", &mut ranks, since, 1, &["rare.tar"]);
    ended("a broken shard", &mut ranks[..2], since, 1, &["rank 2 on ", "broken at byte", "hint:"]);
    nobody_is_left("a broken shard", &job);
}

/// It has no such shard, and says so before it trains.
fn missing_shard() {
    let dir = tempfile::tempdir().unwrap();
    let (job, mut ranks) = one_sees(dir.path(), |_| ());
    until("a rank fails", || ranks[2].has_ended());
    let since = Instant::now();
    ended("a missing shard", &mut ranks[2..], since, 2, &["rare.tar"]);
    ended("a missing shard", &mut ranks[..2], since, 1, &["rank 2 on ", "rare.tar", "hint:"]);
    nobody_is_left("a missing shard", &job);
}

/// Three ranks, of which the last one has something else as `rare.tar`, which is rarely read.
fn one_sees(dir: &Path, rare: impl FnOnce(&Path)) -> (Job, Vec<Process>) {
    let (usual, other) = (view(dir, "usual"), view(dir, "other"));
    symlink(root().join("data/demo/text-train-000000.tar"), usual.join("rare.tar")).unwrap();
    rare(&other);
    let sources = "data.sources=[{name: often, shards: data/demo/caption-train-000000.tar}, \
                   {name: rare, shards: rare.tar, weight: 0.03}]";
    let job = job(&[&THREE[..], &[sources]].concat());
    let start = |rank| {
        let mut command = job.rank(rank, 3);
        command.current_dir(if rank == 2 { &other } else { &usual });
        job.start(&format!("rank-{rank}"), command)
    };
    let ranks = [0, 1, 2].map(start).into();
    (job, ranks)
}

/// A weight that is not a number counts only for samples with a certain word: those of one rank in this step.
fn not_a_number() {
    let dir = tempfile::tempdir().unwrap();
    let llm = language_model(dir.path(), &["model.llm.random.tie_word_embeddings=false"]);
    poison(&llm.join("model.safetensors"), "model.embed_tokens.weight", 436);
    let from = format!("model.llm={{from: {}}}", llm.display());
    let job = job(&[&THREE[..], &[&from]].concat());
    let mut ranks = job.start_ranks(3);
    until("a rank fails", || ranks.iter_mut().any(Process::has_ended));
    let words = ["not finite", "samples: ", "hint:"];
    ended("not a number", &mut ranks, Instant::now(), 1, &words);
    let samples: Vec<String> = ranks
        .iter()
        .map(|rank| rank.said().lines().find(|line| line.starts_with("samples: ")).unwrap().to_owned())
        .collect();
    assert!(samples.iter().all(|list| *list == samples[0]), "{samples:?}");
    nobody_is_left("not a number", &job);
}

/// Makes a row of a table in a file of tensors infinite.
fn poison(file: &Path, name: &str, row: usize) {
    let mut bytes = fs::read(file).unwrap();
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
    let tensor = &header[name];
    assert_eq!(tensor["dtype"], "F32", "{header}");
    let row_bytes = tensor["shape"][1].as_u64().unwrap() as usize * 4;
    let start = 8 + header_bytes + tensor["data_offsets"][0].as_u64().unwrap() as usize + row * row_bytes;
    for value in bytes[start..start + row_bytes].chunks_mut(4) {
        value.copy_from_slice(&f32::INFINITY.to_le_bytes());
    }
    fs::write(file, bytes).unwrap();
}

fn asked_to_stop() {
    let job = job(&THREE);
    let mut ranks = job.start_ranks(3);
    job.wait_for_step(2, &mut ranks);
    let since = Instant::now();
    signal("TERM", ranks[2].pid());
    ended("asked to stop", &mut ranks, since, 3, &[]);
    assert!(ranks[0].said().contains("saved at step"), "{}", ranks[0].said());
    job.newest();
    nobody_is_left("asked to stop", &job);
}

/// A folder to start a rank in that looks like the repository.
fn view(dir: &Path, name: &str) -> PathBuf {
    let view = dir.join(name);
    fs::create_dir(&view).unwrap();
    for shared in ["configs", "data"] {
        symlink(root().join(shared), view.join(shared)).unwrap();
    }
    view
}

/// A folder with the tiny language model.
fn language_model(dir: &Path, sets: &[&str]) -> PathBuf {
    let (set, out) = (crate::under(dir), dir.join("exported"));
    let mut args = vec!["--config", "configs/tiny/stage1.yaml", "--set", &set, "--stop-at", "1"];
    for set in [&["eval=null"], sets].concat() {
        args.extend(["--set", set]);
    }
    run(&args, 3);
    let checkpoint = dir.join("runs/tiny/stage1");
    let [checkpoint, to] = [&checkpoint, &out].map(|path| path.to_str().unwrap());
    run(&["export", "--checkpoint", checkpoint, "--what", "llm", "--out", to], 0);
    out
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}
