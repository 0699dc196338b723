//! A task's place as Slurm's `srun` says it (environment variables of srun(1), `src/common/env.c` of Slurm).
//!
//! A batch script has most of these variables too, with a rank of 0 and the number of tasks it may start: it
//! is told apart, since as rank 0 it would wait for tasks that nobody starts.

use super::place::{Place, Rendezvous, Server, Starter, Vars, below};
use crate::error::{Error, Result};

const HINT: &str = "start every process with `srun`, which sets Slurm's variables";

/// Ports derived from job numbers lie below those that Linux hands out by itself.
const PORTS: std::ops::Range<usize> = 15000..25000;

/// The place of a task; nothing outside Slurm, or where there is only one task.
pub(super) fn place(vars: &Vars<'_>) -> Result<Option<Place>> {
    let step_tasks = vars.number("SLURM_STEP_NUM_TASKS", HINT)?;
    let (size_name, size) = match step_tasks {
        Some(tasks) => ("SLURM_STEP_NUM_TASKS", tasks),
        None => ("SLURM_NTASKS", vars.number("SLURM_NTASKS", HINT)?.unwrap_or(1)),
    };
    if size <= 1 {
        return Ok(None);
    }
    let step = match (step_tasks, task_step(vars)) {
        (_, Some(step)) => step,
        (Some(_), None) => 0,
        (None, None) => {
            return Err(Error::usage(
                format!(
                    "`{size_name}={size}`, and this is none of these tasks but the script that may start them"
                ),
                "put `srun` before the command; for one process alone use `env -u SLURM_NTASKS`",
            ));
        }
    };
    let rank = vars.required("SLURM_PROCID", HINT)?;
    let local_rank = vars.required("SLURM_LOCALID", HINT)?;
    let local_size = tasks_here(vars)?;
    below(("SLURM_PROCID", rank), (size_name, size))?;
    below(("SLURM_LOCALID", local_rank), ("SLURM_STEP_TASKS_PER_NODE", local_size))?;
    let job = vars.required("SLURM_JOB_ID", HINT)?;
    let rendezvous = Rendezvous {
        host: host(vars)?,
        port: vars.port("MASTER_PORT")?.unwrap_or_else(|| port(job, step)),
        served_by: Server::Rank0,
        prefix: format!("sail/{job}.{step}"),
    };
    let started_by = Starter::Slurm;
    Ok(Some(Place { rank, size, local_rank, local_size, rendezvous: Some(rendezvous), started_by }))
}

/// The step this task belongs to; nothing for a batch script or an interactive shell, whose numbers are
/// -5 and -6 as 32 bits without a sign, printed with or without one (`slurm/slurm.h`).
fn task_step(vars: &Vars<'_>) -> Option<usize> {
    vars.get("SLURM_STEP_ID")?.parse().ok().filter(|step| *step < 0xffff_fff0)
}

/// The machine of rank 0.
fn host(vars: &Vars<'_>) -> Result<String> {
    if let Some(host) = vars.get("MASTER_ADDR") {
        return Ok(host);
    }
    // A step may run on a part of its job's nodes.
    for name in ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"] {
        if let Some(list) = vars.get(name) {
            return first_host(&list).ok_or_else(|| {
                Error::usage(
                    format!("`{name}={list}` is not a list of hosts"),
                    "set MASTER_ADDR to the machine that runs rank 0",
                )
            });
        }
    }
    Err(Error::usage("`SLURM_JOB_NODELIST` is not set", "set MASTER_ADDR to the machine that runs rank 0"))
}

/// A port that other jobs and other steps of this job on the same machine rarely share.
fn port(job: usize, step: usize) -> u16 {
    (PORTS.start + job.wrapping_add(step.wrapping_mul(101)) % PORTS.len()) as u16
}

/// The tasks on this node.
fn tasks_here(vars: &Vars<'_>) -> Result<usize> {
    let node = vars.number("SLURM_NODEID", HINT)?.unwrap_or(0);
    for name in ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"] {
        if let Some(counts) = vars.get(name) {
            return tasks_of_node(&counts, node).ok_or_else(|| {
                Error::usage(format!("`{name}={counts}` does not say how many tasks node {node} has"), HINT)
            });
        }
    }
    Err(Error::usage("`SLURM_STEP_TASKS_PER_NODE` is not set", HINT))
}

/// The count of one node in `8(x2),4`: two nodes with 8, one with 4. One count alone is every node's.
fn tasks_of_node(counts: &str, node: usize) -> Option<usize> {
    if let Ok(count) = counts.parse() {
        return Some(count);
    }
    let mut first = 0;
    for group in counts.split(',') {
        let (count, nodes) = match group.split_once("(x") {
            Some((count, nodes)) => (count, nodes.strip_suffix(')')?.parse().ok()?),
            None => (group, 1),
        };
        let count = count.parse().ok()?;
        first += nodes;
        if node < first {
            return Some(count);
        }
    }
    None
}

/// The first host of `node[03-07,09],login1`: brackets, of which there may be several, hold numbers and
/// ranges.
fn first_host(list: &str) -> Option<String> {
    let (mut host, mut rest) = (String::new(), list);
    loop {
        let Some(at) = rest.find(['[', ',', ']']) else {
            host.push_str(rest);
            break;
        };
        host.push_str(&rest[..at]);
        match &rest[at..=at] {
            "[" => {
                let (numbers, after) = rest[at + 1..].split_once(']')?;
                let first = numbers.split([',', '-']).next().filter(|first| is_number(first))?;
                host.push_str(first);
                rest = after;
            }
            "," => break,
            _ => return None,
        }
    }
    let valid = |char: char| char.is_ascii_alphanumeric() || "-._:".contains(char);
    (!host.is_empty() && host.chars().all(valid)).then_some(host)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Place> {
        Place::read(|name| {
            let set = vars.iter().rev().find(|(known, _)| *known == name);
            set.map(|(_, value)| (*value).to_owned())
        })
    }

    /// The sixth of eight tasks, as `srun` starts it on two nodes.
    const SIXTH: [(&str, &str); 10] = [
        ("SLURM_JOB_ID", "1234567"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_NTASKS", "8"),
        ("SLURM_STEP_NUM_TASKS", "8"),
        ("SLURM_PROCID", "5"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NODEID", "1"),
        ("SLURM_JOB_NODELIST", "gpu[07-08]"),
        ("SLURM_STEP_NODELIST", "gpu[07-08]"),
        ("SLURM_STEP_TASKS_PER_NODE", "4(x2)"),
    ];

    fn with<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        [&SIXTH[..], more].concat()
    }

    #[test]
    fn the_first_host_of_a_list() {
        let cases = [
            ("node[03-07,09]", "node03"),
            ("node[9,10-12]", "node9"),
            ("a[1-2]b[3-4]", "a1b3"),
            ("gpu-1,gpu-2", "gpu-1"),
            ("gpu-a-[001-128]", "gpu-a-001"),
            ("n[1-2].cluster.example,login1", "n1.cluster.example"),
            ("rack[0-3]-node[08-15].example", "rack0-node08.example"),
            ("single", "single"),
            ("10.0.0.1", "10.0.0.1"),
        ];
        for (list, expected) in cases {
            assert_eq!(first_host(list).as_deref(), Some(expected), "{list}");
        }
        for list in
            ["node[03-07", "node03-07]", "node[]", "node[a-b]", "[", "", ",node1", "node 1", "node[-3]"]
        {
            assert_eq!(first_host(list), None, "{list}");
        }
    }

    #[test]
    fn tasks_of_each_node() {
        let cases = [
            ("8", 0, Some(8)),
            ("8", 3, Some(8)),
            ("8(x2)", 1, Some(8)),
            ("8(x2)", 2, None),
            ("8(x2),4", 2, Some(4)),
            ("2,8(x3),1", 3, Some(8)),
            ("2,8(x3),1", 4, Some(1)),
            ("8(x2", 0, None),
            ("many", 0, None),
            ("", 0, None),
        ];
        for (counts, node, expected) in cases {
            assert_eq!(tasks_of_node(counts, node), expected, "{counts} {node}");
        }
    }

    #[test]
    fn sruns_variables_give_the_place() {
        let place = |rank, local_rank, rendezvous: (&str, u16, &str)| Place {
            rank,
            size: 8,
            local_rank,
            local_size: 4,
            rendezvous: Some(Rendezvous {
                host: rendezvous.0.to_owned(),
                port: rendezvous.1,
                served_by: Server::Rank0,
                prefix: rendezvous.2.to_owned(),
            }),
            started_by: Starter::Slurm,
        };
        let job = "sail/1234567.0";
        let cases = [
            (with(&[]), place(5, 1, ("gpu07", 19567, job))),
            (
                with(&[("SLURM_PROCID", "0"), ("SLURM_LOCALID", "0"), ("SLURM_NODEID", "0")]),
                place(0, 0, ("gpu07", 19567, job)),
            ),
            (with(&[("MASTER_PORT", "29500")]), place(5, 1, ("gpu07", 29500, job))),
            (with(&[("MASTER_ADDR", "10.0.0.1")]), place(5, 1, ("10.0.0.1", 19567, job))),
            (with(&[("SLURM_STEP_NODELIST", "gpu08,gpu07")]), place(5, 1, ("gpu08", 19567, job))),
            (with(&[("SLURM_STEP_NODELIST", "")]), place(5, 1, ("gpu07", 19567, job))),
            (with(&[("SLURM_STEP_ID", "3")]), place(5, 1, ("gpu07", 19870, "sail/1234567.3"))),
            (with(&[("SLURM_STEP_NUM_TASKS", "")]), place(5, 1, ("gpu07", 19567, job))),
            // The job may have more tasks than this step.
            (with(&[("SLURM_NTASKS", "64")]), place(5, 1, ("gpu07", 19567, job))),
            (
                with(&[("SLURM_STEP_TASKS_PER_NODE", ""), ("SLURM_NTASKS_PER_NODE", "4")]),
                place(5, 1, ("gpu07", 19567, job)),
            ),
            (with(&[("SLURM_STEP_TASKS_PER_NODE", "3,4,1")]), place(5, 1, ("gpu07", 19567, job))),
        ];
        for (vars, expected) in cases {
            assert_eq!(read(&vars).unwrap(), expected, "{vars:?}");
        }
    }

    #[test]
    fn one_task_is_a_process_alone() {
        for (tasks, step_tasks) in [("1", "1"), ("", ""), ("64", "1")] {
            let vars = with(&[("SLURM_NTASKS", tasks), ("SLURM_STEP_NUM_TASKS", step_tasks)]);
            assert_eq!(read(&vars).unwrap(), Place::SINGLE, "{vars:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let script = "none of these tasks but the script that may start them\n\nhint: put `srun` before";
        let cases: [(&[(&str, &str)], &str); 13] = [
            // A batch script, as older and newer releases number it, and an interactive shell.
            (&[("SLURM_STEP_NUM_TASKS", ""), ("SLURM_STEP_ID", "")], script),
            (&[("SLURM_STEP_NUM_TASKS", ""), ("SLURM_STEP_ID", "-5")], script),
            (&[("SLURM_STEP_NUM_TASKS", ""), ("SLURM_STEP_ID", "4294967291")], script),
            (&[("SLURM_STEP_NUM_TASKS", ""), ("SLURM_STEP_ID", "4294967290")], script),
            (&[("SLURM_PROCID", "")], "`SLURM_PROCID` is not set"),
            (&[("SLURM_PROCID", "x")], "`SLURM_PROCID=x` is not a number"),
            (&[("SLURM_PROCID", "8")], "`SLURM_PROCID=8` is not below `SLURM_STEP_NUM_TASKS=8`"),
            (&[("SLURM_LOCALID", "4")], "`SLURM_LOCALID=4` is not below `SLURM_STEP_TASKS_PER_NODE=4`"),
            (&[("SLURM_JOB_ID", "")], "`SLURM_JOB_ID` is not set"),
            (&[("SLURM_STEP_NODELIST", "gpu[07")], "`SLURM_STEP_NODELIST=gpu[07` is not a list of hosts"),
            (&[("SLURM_STEP_NODELIST", ""), ("SLURM_JOB_NODELIST", "")], "`SLURM_JOB_NODELIST` is not set"),
            (&[("SLURM_STEP_TASKS_PER_NODE", "8(x")], "`SLURM_STEP_TASKS_PER_NODE=8(x` does not say"),
            (&[("MASTER_PORT", "99999")], "`MASTER_PORT=99999` is not a port"),
        ];
        for (more, expected) in cases {
            let error = read(&with(more)).unwrap_err();
            assert!(error.to_string().contains(expected) && error.to_string().contains("hint:"), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
