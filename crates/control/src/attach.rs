//! The user's terminal at a machine's terminal.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use wardian_backend::{EventLoop, Terminal};

use crate::client::{Client, ClientError};

/// Shows the machine's terminal, the last `past` bytes first, and passes on what is typed, until the user leaves
/// (Ctrl-a x) or the machine has ended. Says whether the machine has ended.
///
/// # Errors
/// When the machine cannot be reached or has no terminal, or ours cannot be put into raw mode.
pub fn attach(client: &Client, past: usize) -> Result<bool, ClientError> {
    let (mut stream, begun) = client.console(past)?;
    let lost = |source| ClientError::Connection { name: client.name().to_owned(), source };
    let (typed, leaves) = (stream.try_clone().map_err(lost)?, stream.try_clone().map_err(lost)?);
    let left = Arc::new(AtomicBool::new(false));
    let events = EventLoop::start().map_err(lost)?;
    let quit = {
        let left = Arc::clone(&left);
        move || {
            left.store(true, Ordering::Release);
            let _ = leaves.shutdown(Shutdown::Both);
        }
    };
    let sink = move |bytes: &[u8]| (&typed).write(bytes).unwrap_or(bytes.len());
    let terminal = Terminal::attach(&events.handle(), Box::new(sink), quit);
    let terminal = terminal.map_err(|error| lost(io::Error::other(error)))?;
    let shown = show(&begun, &mut stream);
    drop(terminal);
    let left = left.load(Ordering::Acquire);
    match shown {
        Err(error) if !left => Err(lost(error)),
        _ => Ok(!left),
    }
}

/// Prints all that comes.
fn show(begun: &[u8], stream: &mut UnixStream) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(begun)?;
    stdout.flush()?;
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                stdout.write_all(&bytes[..count])?;
                stdout.flush()?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
