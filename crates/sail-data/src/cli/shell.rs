//! What shells and `man` know of a program, of this one and of others that say so.

use std::io;
use std::path::Path;

use clap::Command;
use clap_complete::Shell;

/// A script with which `shell` completes the commands and options of `program`.
pub fn completions(mut program: Command, shell: Shell) -> String {
    let (name, mut script) = (program.get_name().to_owned(), Vec::new());
    clap_complete::generate(shell, &mut program, name, &mut script);
    String::from_utf8(script).expect("invariant: made of text")
}

/// Writes the manual pages of `program` and of each of its commands into `dir`, which is made where it is not there.
///
/// # Errors
/// Those of the system.
pub fn manual(program: Command, dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    clap_mangen::generate_to(program, dir)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Args;

    #[test]
    fn every_shell_and_every_command_is_written() {
        for shell in [Shell::Bash, Shell::Elvish, Shell::Fish, Shell::PowerShell, Shell::Zsh] {
            let script = completions(Args::command(), shell);
            assert!(script.contains("rebalance") && script.contains("max-tiles"), "{shell}");
        }
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("man/man1");
        manual(Args::command(), &out).unwrap();
        let page = std::fs::read_to_string(out.join("sail-data-pack.1")).unwrap();
        assert!(page.contains("sail\\-data pack llava_v1_5_mix665k.json"), "{page}");
        assert!(out.join("sail-data.1").exists() && out.join("sail-data-inspect.1").exists());
    }
}
