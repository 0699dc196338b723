//! Ranks in networks of their own: two hosts of which the link is cut, and the bytes that a step sends.
//!
//! The hosts are network namespaces with names of their own, which takes root; without, the tests are skipped.

use std::fs;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use sail_train::optim::StateKind;

use crate::processes::{Job, all_end, assert_same, complete, steps, until};

/// A network namespace, removed when it is dropped.
struct Network(String);

impl Network {
    /// Nothing, with the reason printed, where it is not permitted.
    fn new(name: &str) -> Option<Self> {
        let name = format!("sail-{}-{name}", std::process::id());
        let made = Command::new("ip").args(["netns", "add", &name]).output();
        match made {
            Ok(made) if made.status.success() => {
                let network = Self(name);
                network.ip("link set lo up");
                Some(network)
            }
            Ok(made) => {
                println!("skipped: no network namespace: {}", String::from_utf8_lossy(&made.stderr));
                None
            }
            Err(error) => {
                println!("skipped: no `ip` command: {error}");
                None
            }
        }
    }

    fn ip(&self, args: &str) {
        succeeds(Command::new("ip").args(["-n", &self.0]).args(args.split(' ')));
    }

    /// The same command in this network, on a host of this name with a list of others.
    fn on_host(&self, host: &str, hosts: &str, command: &Command) -> Command {
        let script = "hostname \"$1\" && mount --bind \"$2\" /etc/hosts && shift 2 && exec \"$@\"";
        let mut inside = self.inside(&["unshare", "--uts", "sh", "-c", script, "sh", host, hosts]);
        inside.arg(command.get_program()).args(command.get_args());
        inside.current_dir(crate::root());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside
    }

    fn inside(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0]).args(args);
        command
    }

    /// Bytes of TCP segments that went over the loopback device, without their headers.
    fn loopback_bytes(&self) -> u64 {
        /// Ethernet, IPv4, and TCP with time stamps; a large segment that the kernel passes on whole counts once.
        const HEADER_BYTES: u64 = 14 + 20 + 32;
        let output = succeeds(&mut self.inside(&["cat", "/proc/net/dev"]));
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find_map(|line| line.trim().strip_prefix("lo:")).unwrap();
        let numbers: Vec<u64> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
        numbers[0] - HEADER_BYTES * numbers[1]
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // What is left of it would only be in the way of nobody.
        drop(Command::new("ip").args(["netns", "del", &self.0]).output());
    }
}

fn succeeds(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// `left` knows its own name as an address that only it has, as many systems are set up.
#[test]
fn a_cut_link_ends_both_sides_and_they_resume() {
    let (Some(left), Some(right)) = (Network::new("left"), Network::new("right")) else { return };
    let cable = format!("link add cable type veth peer name cable netns {}", right.0);
    left.ip(&cable);
    for (host, address) in [(&left, "10.77.0.1/24"), (&right, "10.77.0.2/24")] {
        host.ip(&format!("address add {address} dev cable"));
        host.ip("link set cable up");
    }
    let sets = ["batch.packs_per_step=2", "data.streams=2", "batch.tokens_per_pack=128"];
    let more = ["schedule.steps=60", "checkpoint.every=5", "parallel.timeout_secs=4"];
    let undisturbed = Job::new(&[&sets[..], &more].concat());
    undisturbed.run(undisturbed.launch(2), 0);

    let job = Job::new(&[&sets[..], &more].concat());
    let hosts = [("left", "127.0.1.1 left"), ("right", "10.77.0.1 left")].map(|(name, line)| {
        let path = job.dir.path().join(format!("hosts-{name}"));
        fs::write(&path, format!("127.0.0.1 localhost\n{line}\n")).unwrap();
        path.display().to_string()
    });
    let start = |attempt: &str| {
        [(&left, "left", "0"), (&right, "right", "1")].map(|(network, name, number)| {
            let options = ["--nnodes", "2", "--node-rank", number, "--rdzv", "left:29500"];
            let hosts = &hosts[number.parse::<usize>().unwrap()];
            let command = network.on_host(name, hosts, &job.launch_with(1, &options));
            job.start(&format!("{name}-{attempt}"), command)
        })
    };
    let mut launchers = start("first");
    job.wait_for_step(7, &mut launchers);
    // It is written beside the steps after it, and both sides say that it is whole.
    until("a checkpoint", || !complete(&job.run_dir()).is_empty());
    let since = Instant::now();
    left.ip("link set cable down");
    let took = all_end(&mut launchers, since, Duration::from_secs(4 + 10));
    println!("a cut link: the last one ended after {:.1} s", took.as_secs_f64());
    let done = steps(&job.run_dir()).len();
    assert!(done < 60, "it was cut before the end");
    for (launcher, words) in launchers.iter().zip([
        "no sign of life from rank 1 on right",
        "which serves the ranks' store at left:29500, has not answered for",
    ]) {
        let said = launcher.said();
        println!("--- {}, code {}\n{said}", launcher.name, launcher.code());
        assert_eq!(launcher.code(), 1, "{said}");
        assert!(said.contains(words) && said.contains("hint:"), "{said}");
    }
    assert!(job.left().is_empty());

    left.ip("link set cable up");
    let mut launchers = start("second");
    all_end(&mut launchers, Instant::now(), Duration::from_secs(60));
    for launcher in &launchers {
        assert_eq!(launcher.code(), 0, "{}", launcher.said());
    }
    assert!(launchers[0].said().contains("resumes after step"), "{}", launchers[0].said());
    assert_same("after a cut link", &job, &undisturbed);
}

#[test]
fn a_step_sends_what_the_formula_says() {
    check_bytes(&[(2, "zero2")]);
}

#[test]
#[ignore = "a minute; run by scripts/test.sh --extended"]
fn a_step_sends_what_the_formulas_say_with_every_strategy() {
    check_bytes(&[(2, "ddp"), (2, "zero1"), (2, "zero2"), (4, "ddp"), (4, "zero1"), (4, "zero2")]);
}

/// Start-up, saving and the end cancel out in the difference of a longer and a shorter training.
fn check_bytes(cases: &[(usize, &str)]) {
    let Some(network) = Network::new("bytes") else { return };
    let packs = 4;
    for (ranks, strategy) in cases {
        let sent = [2, 8].map(|steps| {
            let strategy = format!("parallel.strategy={strategy}");
            let job = Job::new(&[
                "batch.packs_per_step=4",
                "data.streams=4",
                "batch.tokens_per_pack=64",
                &strategy,
            ]);
            let mut job = job;
            job.set(&["train={vision: {lr: 1e-4}, projector: {lr: 1e-4}, llm: {lr: 1e-4}}"]);
            job.set(&[&format!("schedule.steps={steps}"), "parallel.bucket_mb=4"]);
            let before = network.loopback_bytes();
            let inside = network.inside(&[]);
            let mut command = Command::new(inside.get_program());
            let launch = job.launch(*ranks);
            command.args(inside.get_args()).arg(launch.get_program()).args(launch.get_args());
            command.current_dir(crate::root()).env("OMP_NUM_THREADS", "1");
            job.run(command, 0);
            let checkpoint = job.newest();
            let elements = |name: &str| checkpoint.tensor(name, StateKind::Param).unwrap().numel() as u64;
            (network.loopback_bytes() - before, 4 * checkpoint.names().map(elements).sum::<u64>())
        });
        let step_bytes = (sent[1].0 - sent[0].0) / 6;
        let whole = sent[0].1 * (*ranks as u64 - 1);
        // All ranks together: an all-reduce sends 2 (N-1) times the bytes, a reduce-scatter and an all-gather
        // each half of it.
        let formula = match *strategy {
            "ddp" | "zero1" => 2 * whole,
            _ => (packs / *ranks as u64 + 1) * whole,
        };
        let ratio = step_bytes as f64 / formula as f64;
        println!(
            "{ranks} ranks, {strategy}: {step_bytes} bytes a step, {formula} by the formula: {ratio:.4}"
        );
        assert!((0.98..1.02).contains(&ratio), "{ranks} ranks, {strategy}: {ratio}");
    }
}
