//! Makes steps of a stage one by one, as the train loop does it, and keeps nothing.
//!
//! `cargo run --release --example train_steps -- configs/tiny/stage1.yaml 3`
//!
//! For everything around the steps (checkpoints, evaluation, signals) call `sail_train::train_loop::run_stage`.

use std::env;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use sail_train::Error;
use sail_train::config::{Config, Plan, load};
use sail_train::session::Session;
use sail_train::world::World;

fn main() -> ExitCode {
    match run(&env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(args: &[String]) -> Result<(), Error> {
    let (plan, steps) = arguments(args)?;
    let mut session = Session::build(&plan, &Arc::new(World::alone()), None)?;
    print!("{}", session.freeze.table());
    for _ in 0..steps {
        // The packs of a step; `None` where the data has an end and it is reached.
        let Some(step) = session.next_step()? else { break };
        let loss = session.accumulate(&step)?;
        // All ranks read the same numbers, and decide alike.
        let verdict = session.agree(&loss, false, true)?;
        if let Some(trip) = session.judge(&verdict) {
            return Err(usage(format!("step {}: {}", session.step + 1, trip.reason), "lower `train.*.lr`"));
        }
        let factors = session.factors(&step);
        session.update(&step, &factors)?;
        session.advance(&step)?;
        println!("step {}: loss {:.4}, gradient norm {:.2}", session.step, verdict.loss, verdict.grad_norm);
    }
    let totals = session.totals;
    println!("{} samples, {} tokens", totals.samples, totals.tokens);
    Ok(())
}

fn arguments(args: &[String]) -> Result<(Plan, u64), Error> {
    let how = "train_steps STAGE.yaml STEPS";
    let [file, steps] = args else { return Err(usage("two arguments are needed".to_owned(), how)) };
    let steps = steps.parse().map_err(|_| usage(format!("`{steps}` is no number of steps"), how))?;
    match load(Path::new(file), &[])? {
        Config::Stage(plan) => Ok((*plan, steps)),
        Config::Curriculum(_) => Err(usage(format!("`{file}` is a curriculum"), "give the file of a stage")),
    }
}

fn usage(message: String, hint: impl Into<String>) -> Error {
    Error::Usage { message, hint: hint.into() }
}
