//! A web server for shards that falls silent within one of them.

use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;

/// Serves the files as `/0.tar`, `/1.tar`, ..., the last one only up to `silent_from`; its address. The server
/// lives as long as the test's process.
pub(crate) fn start(files: &[PathBuf], silent_from: u64) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let files = files.to_vec();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, files) = (stream.unwrap(), files.clone());
            // A client that has gone is no matter.
            std::thread::spawn(move || drop(answer(stream, &files, silent_from)));
        }
    });
    address
}

fn answer(mut stream: TcpStream, files: &[PathBuf], silent_from: u64) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut number, mut range, mut line) = (0, None, String::new());
    while reader.read_line(&mut line)? > 2 {
        if let Some(path) = line.strip_prefix("GET /") {
            number = path.split('.').next().and_then(|number| number.parse().ok()).unwrap();
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            let (start, last) = value.trim().split_once('-').unwrap();
            range = Some((start.parse::<u64>().unwrap(), last.parse::<u64>().unwrap()));
        }
        line.clear();
    }
    let mut file = std::fs::File::open(&files[number])?;
    let len = file.metadata()?.len();
    let (start, last) = range.map_or((0, len - 1), |(start, last)| (start, last.min(len - 1)));
    if number + 1 == files.len() && last >= silent_from {
        std::thread::park();
    }
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {start}-{last}/{len}\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        last + 1 - start
    )?;
    file.seek(SeekFrom::Start(start))?;
    std::io::copy(&mut file.take(last + 1 - start), &mut stream).map(drop)
}
