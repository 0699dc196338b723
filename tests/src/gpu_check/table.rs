//! The table that is printed: a row for each check, and whether one has failed.

use std::any::Any;
use std::error::Error;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::time::Instant;

/// What a check found, in words; an error is a check that failed.
pub(crate) type Figure = Result<String, Box<dyn Error>>;

/// Rows so far.
pub(crate) struct Table {
    failed: Vec<String>,
    rows: usize,
    skipped: usize,
    started: Instant,
}

impl Table {
    /// Prints the head.
    pub(crate) fn begin() -> Self {
        // A panic is a check that failed, and its row says why.
        panic::set_hook(Box::new(|_| ()));
        print_row("check", "result", "figure");
        Self { failed: Vec::new(), rows: 0, skipped: 0, started: Instant::now() }
    }

    /// Makes a check and prints its row; whether it was passed.
    pub(crate) fn row(&mut self, check: &str, make: impl FnOnce() -> Figure) -> bool {
        let found = panic::catch_unwind(AssertUnwindSafe(make));
        self.rows += 1;
        match found.unwrap_or_else(|panic| Err(words(&*panic).into())) {
            Ok(figure) => print_row(check, "ok", &figure),
            Err(error) => {
                print_row(check, "FAILED", &error.to_string());
                self.failed.push(check.to_owned());
                return false;
            }
        }
        true
    }

    /// Prints a row for what cannot be checked here.
    pub(crate) fn skip(&mut self, check: &str, why: &str) {
        self.skipped += 1;
        print_row(check, "skipped", why);
    }

    /// Prints what it all amounts to.
    pub(crate) fn end(self) -> ExitCode {
        let Self { failed, rows, skipped, started } = self;
        let secs = started.elapsed().as_secs();
        let skipped = if skipped == 0 { String::new() } else { format!(", {skipped} were skipped") };
        if failed.is_empty() {
            println!("\nall {rows} checks passed in {secs} s{skipped}");
            return ExitCode::SUCCESS;
        }
        println!("\n{} of {rows} checks failed in {secs} s{skipped}: {}", failed.len(), failed.join("; "));
        ExitCode::FAILURE
    }
}

fn print_row(check: &str, result: &str, figure: &str) {
    println!("{check:<44} {result:<8} {figure}");
}

fn words(panic: &dyn Any) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}
