//! What the ranks print, line by line, each with its rank in front.
//!
//! Bytes are passed on as they are. A line is written in one piece, so that lines of different ranks do not
//! mix; one that is longer than [`LINE_BYTES`] becomes several. A line of warning in the log as text that many
//! ranks have is shown for one of them, and that another has it too; the ranks' own log files have every one.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::{Arc, Mutex};

use crate::threads::lock;

/// Longest line that is kept whole.
const LINE_BYTES: u64 = 1 << 20;

/// Where ranks' lines go.
pub(super) type Sink = Arc<Mutex<dyn Write + Send>>;

/// Where standard output and standard error of the ranks go.
#[derive(Clone)]
pub(super) struct Outputs {
    pub(super) out: Sink,
    pub(super) err: Sink,
    pub(super) warnings: Arc<Warnings>,
}

impl Outputs {
    /// The launcher's own.
    pub(super) fn standard() -> Self {
        Self::to(Arc::new(Mutex::new(io::stdout())), Arc::new(Mutex::new(io::stderr())))
    }

    pub(super) fn to(out: Sink, err: Sink) -> Self {
        Self { out, err, warnings: Arc::default() }
    }
}

/// Warnings that ranks have printed, without their times, each with its ranks in the order in which they did.
#[derive(Default)]
pub(super) struct Warnings(Mutex<BTreeMap<Vec<u8>, Vec<usize>>>);

/// Warnings that are kept: beyond them each is shown.
const MOST_WARNINGS: usize = 1000;

impl Warnings {
    /// What is shown of a rank's line; None where enough ranks have said it.
    fn shown<'a>(&self, rank: usize, line: &'a [u8]) -> Option<Cow<'a, [u8]>> {
        let Some(warning) = without_time(line) else { return Some(line.into()) };
        let mut known = lock(&self.0);
        if known.len() >= MOST_WARNINGS && !known.contains_key(warning) {
            return Some(line.into());
        }
        let ranks = known.entry(warning.to_vec()).or_default();
        let is_new = !ranks.contains(&rank);
        if is_new {
            ranks.push(rank);
        }
        match ranks[..] {
            // One that a rank has again, it has again.
            [first, ..] if first == rank => Some(line.into()),
            [first, second] if second == rank && is_new => {
                let more = "as further ranks may, for which it is not shown";
                Some(format!("has the same warning as rank {first}, {more}\n").into_bytes().into())
            }
            _ => None,
        }
    }
}

/// What a line of the log as text says from its level on, if it is a warning of the program: other libraries' have no time
/// in front, and are in no file.
fn without_time(line: &[u8]) -> Option<&[u8]> {
    const LEVEL: &[u8] = b"WARN ";
    let end = line.iter().position(|byte| *byte == b' ')?;
    let (time, rest) = (&line[..end], line[end..].trim_ascii_start());
    let is_time = time.len() >= 20 && time[10] == b'T' && time[4] == b'-' && time.last() == Some(&b'Z');
    (is_time && rest.starts_with(LEVEL)).then_some(rest)
}

/// Passes on lines until the last process that can write them has ended.
pub(super) fn pass_on(input: impl Read, rank: usize, warnings: &Warnings, sink: &Sink) {
    let prefix = format!("[rank {rank}] ").into_bytes();
    let mut input = BufReader::new(input);
    let mut open = true;
    loop {
        let mut line = Vec::new();
        match input.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line) {
            // A pipe that cannot be read has nothing to pass on.
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        // A reader that has gone is no reason to stop training: what comes is read, and dropped.
        if let Some(line) = warnings.shown(rank, &line).filter(|_| open) {
            let line = [&prefix[..], &line].concat();
            let mut sink = lock(sink);
            open = sink.write_all(&line).and_then(|()| sink.flush()).is_ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed_on(input: &[u8]) -> Vec<u8> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink: Sink = lines.clone();
        pass_on(input, 3, &Warnings::default(), &sink);
        lines.lock().unwrap().clone()
    }

    #[test]
    fn every_line_has_its_rank_and_its_bytes() {
        assert_eq!(passed_on(b""), b"");
        assert_eq!(passed_on(b"one\n\ntwo\r\n"), b"[rank 3] one\n[rank 3] \n[rank 3] two\r\n");
        assert_eq!(passed_on(b"not \xff\xfe UTF-8\0\n"), b"[rank 3] not \xff\xfe UTF-8\0\n");
        assert_eq!(passed_on(b"whole\nwithout an end"), b"[rank 3] whole\n[rank 3] without an end\n");
    }

    #[test]
    fn a_warning_of_many_ranks_is_shown_once() {
        let warnings = Warnings::default();
        let said = |rank: usize, time: u32, text: &str| {
            let lines = Arc::new(Mutex::new(Vec::new()));
            let sink: Sink = lines.clone();
            let line = format!("2026-01-01T00:00:{time:02}.000000Z  {text}\n");
            pass_on(line.as_bytes(), rank, &warnings, &sink);
            String::from_utf8(lines.lock().unwrap().clone()).unwrap()
        };
        let line = |rank: usize, time: u32, text: &str| {
            format!("[rank {rank}] 2026-01-01T00:00:{time:02}.000000Z  {text}\n")
        };
        let (slow, other) = ("WARN the disk is slow", "WARN the disk is full");
        assert_eq!(said(5, 1, slow), line(5, 1, slow));
        let too =
            "[rank 2] has the same warning as rank 5, as further ranks may, for which it is not shown\n";
        assert_eq!(said(2, 2, slow), too);
        assert_eq!(said(7, 3, slow) + &said(2, 4, slow), "");
        assert_eq!(said(5, 5, slow), line(5, 5, slow));
        assert_eq!(said(7, 6, other), line(7, 6, other));
        // NCCL's, which were swallowed, and which no file has.
        let mut nccl = String::new();
        for rank in [1, 2, 3] {
            let lines = Arc::new(Mutex::new(Vec::new()));
            let sink: Sink = lines.clone();
            pass_on(&b"node01:1234:1300 [3] NCCL WARN timeout\n"[..], rank, &warnings, &sink);
            nccl += &String::from_utf8(lines.lock().unwrap().clone()).unwrap();
        }
        assert_eq!(nccl.matches("NCCL WARN timeout").count(), 3, "{nccl}");
        // What is no warning belongs to its rank.
        for rank in [1, 2, 3] {
            assert_eq!(said(rank, 7, "INFO begins"), line(rank, 7, "INFO begins"));
        }
    }

    #[test]
    fn a_line_without_an_end_does_not_fill_the_memory() {
        let length = LINE_BYTES as usize;
        let passed = passed_on(&vec![b'x'; 2 * length + 1]);
        let lengths: Vec<_> = passed.split(|&byte| byte == b'\n').map(<[u8]>::len).collect();
        assert_eq!(lengths, [length + 9, length + 9, 10, 0]);
    }

    #[test]
    fn a_reader_that_has_gone_does_not_block_the_rank() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let sink: Sink = Arc::new(Mutex::new(Gone));
        let mut input: &[u8] = b"one\ntwo\n";
        pass_on(&mut input, 0, &Warnings::default(), &sink);
        assert!(input.is_empty());
    }
}
