//! What the ranks print, line by line, each with its rank in front.
//!
//! Bytes are passed on as they are. A line is written in one piece, so that lines of different ranks do not
//! mix; one that is longer than [`LINE_BYTES`] becomes several.

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
}

impl Outputs {
    /// The launcher's own.
    pub(super) fn standard() -> Self {
        Self { out: Arc::new(Mutex::new(io::stdout())), err: Arc::new(Mutex::new(io::stderr())) }
    }
}

/// Passes on lines until the last process that can write them has ended.
pub(super) fn pass_on(input: impl Read, rank: usize, sink: &Sink) {
    let prefix = format!("[rank {rank}] ").into_bytes();
    let mut input = BufReader::new(input);
    let mut open = true;
    loop {
        let mut line = prefix.clone();
        match input.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line) {
            // A pipe that cannot be read has nothing to pass on.
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        // A reader that has gone is no reason to stop training: what comes is read, and dropped.
        if open {
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
        pass_on(input, 3, &sink);
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
        pass_on(&mut input, 0, &sink);
        assert!(input.is_empty());
    }
}
