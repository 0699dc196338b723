//! What `--help` says, of every command.

use sail_train::cli::Args;

use crate::run;

/// Names of all commands, a name a word; the program itself has none.
fn commands(command: &clap::Command, above: &[String], found: &mut Vec<Vec<String>>) {
    found.push(above.to_vec());
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        commands(sub, &[above, &[sub.get_name().to_owned()]].concat(), found);
    }
}

#[test]
fn every_command_explains_itself() {
    let mut found = Vec::new();
    commands(&<Args as clap::CommandFactory>::command(), &[], &mut found);
    assert!(found.len() > 12, "{found:?}");
    for words in found {
        let args: Vec<&str> = words.iter().map(String::as_str).chain(["--help"]).collect();
        let help = String::from_utf8(run(&args, 0).stdout).unwrap();
        let help = help.replace("sail-train-under-test", "sail-train");
        // A group of commands shows them instead.
        assert!(help.contains("Example") || help.contains("Commands:"), "{words:?}: {help}");
        insta::assert_snapshot!(format!("help_{}", words.join("_")), help);
    }
}
