//! Event files of runs that resume, go back and are killed, read record by record. What TensorBoard makes of them is checked
//! end to end.

use serde_json::json;

use super::*;
use crate::config::Module;

fn train(step: u64) -> Value {
    json!({"kind": "train", "step": step, "time": 10.5, "loss": step as f64 / 4.0})
}

/// A run's folder with these lines.
fn run(lines: &[Value]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_metrics(dir.path(), lines);
    dir
}

fn write_metrics(run_dir: &Path, lines: &[Value]) {
    let lines: Vec<String> = lines.iter().map(ToString::to_string).collect();
    fs::write(run_dir.join(METRICS), lines.join("\n") + "\n").unwrap();
}

fn the_file(run_dir: &Path) -> PathBuf {
    let [file] = &event_files(&run_dir.join(FOLDER)).unwrap()[..] else { panic!("there is not one file") };
    file.clone()
}

fn events(run_dir: &Path) -> Vec<Event> {
    let mut file = BufReader::new(File::open(the_file(run_dir)).unwrap());
    let records = std::iter::from_fn(|| framing::next(&mut file).unwrap());
    records.map(|record| Event::decode(&record[..]).unwrap()).collect()
}

/// Tags and steps of all values, in the order of the file.
fn told(run_dir: &Path) -> Vec<(String, i64)> {
    let of = |event: Event| match event.what {
        Some(What::Summary(summary)) => {
            summary.value.into_iter().map(|value| (value.tag, event.step)).collect()
        }
        _ => Vec::new(),
    };
    events(run_dir).into_iter().flat_map(of).collect()
}

fn losses(steps: &[i64]) -> Vec<(String, i64)> {
    steps.iter().map(|step| ("train/loss".to_owned(), *step)).collect()
}

fn open(run_dir: &Path, step: u64) -> TensorBoard {
    TensorBoard::open(run_dir, step, &[]).unwrap()
}

#[test]
fn a_file_begins_with_its_version_and_a_mark_to_forget() {
    let dir = run(&[]);
    let mut board = open(dir.path(), 0);
    let grad_norms = [(Module::Llm, vec![1.0, 2.0])].into();
    board.record(&Record { line: train(1), grad_norms });
    let [version, mark, step] = &events(dir.path())[..] else { panic!("{:?}", events(dir.path())) };
    assert_eq!(version.what, Some(What::FileVersion("brain.Event:2".into())));
    assert_eq!(mark.what, Some(What::SessionLog(SessionLog { status: 1 })));
    assert_eq!((step.step, step.wall_time.to_bits()), (1, 10.5f64.to_bits()));
    assert_eq!(told(dir.path()), [("train/loss".to_owned(), 1), ("train/grad_norms/llm".to_owned(), 1)]);
}

/// Killed within a record, after a step that does not count, and before a record of one that does.
#[test]
fn what_resumes_has_each_step_that_counts_once() {
    let dir = run(&[train(1)]);
    let mut board = open(dir.path(), 0);
    board.record(&train(2).into());
    board.record(&train(3).into());
    drop(board);
    let path = the_file(dir.path());
    let whole = fs::read(&path).unwrap();
    fs::write(&path, [&whole[..], &whole[..20]].concat()).unwrap();
    write_metrics(dir.path(), &[train(1), train(2), json!({"kind": "checkpoint", "step": 2, "secs": 0.5})]);
    let mut board = open(dir.path(), 2);
    assert!(!path.exists() && the_file(dir.path()) > path, "a later name");
    let expected = [losses(&[1, 2]), vec![("checkpoint/secs".to_owned(), 2)]].concat();
    assert_eq!(told(dir.path()), expected);
    // And it goes on.
    board.record(&train(3).into());
    assert_eq!(told(dir.path()), [expected, losses(&[3])].concat());
}

#[test]
fn going_back_forgets_later_steps() {
    let dir = run(&[]);
    let mut board = open(dir.path(), 0);
    let lines: Vec<Value> = (1..=4).map(train).collect();
    for line in &lines {
        board.record(&line.clone().into());
    }
    write_metrics(dir.path(), &lines[..2]);
    board.back_to(2);
    assert_eq!(told(dir.path()), losses(&[1, 2]));
    board.record(&train(3).into());
    assert_eq!(told(dir.path()), losses(&[1, 2, 3]));
}

/// What was killed between the new file and the removal of the old one has both.
#[test]
fn two_files_become_one() {
    let dir = run(&[train(1), train(2)]);
    drop(open(dir.path(), 2));
    let path = the_file(dir.path());
    fs::copy(&path, path.with_file_name(format!("{MARK}0000000001.sail"))).unwrap();
    fs::write(dir.path().join(FOLDER).join("other.txt"), "stays").unwrap();
    drop(open(dir.path(), 2));
    assert_eq!(told(dir.path()), losses(&[1, 2]));
    assert!(dir.path().join(FOLDER).join("other.txt").exists());
    remove(dir.path()).unwrap();
    assert!(event_files(&dir.path().join(FOLDER)).unwrap().is_empty());
}

#[test]
fn texts_are_told_where_they_change() {
    let dir = run(&[]);
    let open =
        |step, text: &str| drop(TensorBoard::open(dir.path(), step, &[("freeze", text.into())]).unwrap());
    open(0, "one");
    open(2, "one");
    open(3, "two");
    let of = |step| ("run/freeze".to_owned(), step);
    assert_eq!(told(dir.path()), [of(0), of(3)]);
    // What was said later is not of this course.
    open(1, "one");
    assert_eq!(told(dir.path()), [of(0)]);
}

#[test]
fn a_picture_is_told_once_with_its_first_answer_that_counts() {
    let dir = run(&[]);
    let jpeg = [&[0xff, 0xd8][..], &[0xff, 0xc0, 0, 17, 8, 0, 32, 1, 64, 3]].concat();
    pictures::write(dir.path(), &[("a/0.tar/x".to_owned(), jpeg)].into()).unwrap();
    let answer = |sample| json!({"sample": sample, "question": "q", "truth": "t", "answer": "a"});
    let eval = |step: u64| {
        let generations = [answer("a/0.tar/x"), answer("a/0.tar/y")];
        json!({"kind": "eval", "step": step, "report": {"total": {"loss": 1.0}, "generations": generations}})
    };
    let mut board = open(dir.path(), 0);
    board.record(&eval(2).into());
    board.record(&eval(4).into());
    let tags = |step: i64| -> Vec<String> {
        told(dir.path()).into_iter().filter(|(_, of)| *of == step).map(|(tag, _)| tag).collect()
    };
    let answers = ["eval/loss", "eval/answers/a/0.tar/x", "eval/answers/a/0.tar/y"];
    assert_eq!(tags(2), [answers[0], "eval/pictures/a/0.tar/x", answers[1], answers[2]]);
    assert_eq!(tags(4), answers);
    // The one with the picture is forgotten.
    write_metrics(dir.path(), &[eval(4)]);
    drop(board);
    let mut board = open(dir.path(), 4);
    board.record(&eval(6).into());
    assert_eq!((tags(2), tags(4)), (Vec::<String>::new(), answers.map(str::to_owned).into()));
    assert_eq!(tags(6).len(), 4);
}
