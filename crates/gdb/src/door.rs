//! The listener: accepts one debugger after the other.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use wardian_cpu::DebugEvent;

use crate::Target;
use crate::session::{self, Event};

/// How long a debugger may leave our answers unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the door is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A TCP port on 127.0.0.1; 0 takes any free one.
    Port(u16),
    /// A Unix socket.
    Path(PathBuf),
}

impl FromStr for Address {
    type Err = GdbError;

    /// A number is a port, anything else a path.
    fn from_str(text: &str) -> Result<Address, GdbError> {
        if text.is_empty() {
            return Err(GdbError::Address(text.to_owned()));
        }
        if text.bytes().all(|b| b.is_ascii_digit()) {
            return text.parse().map(Address::Port).map_err(|_| GdbError::Address(text.to_owned()));
        }
        Ok(Address::Path(PathBuf::from(text)))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Port(port) => write!(f, "127.0.0.1:{port}"),
            Address::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Why the door cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum GdbError {
    /// Neither a port nor a path.
    #[error("'{0}' is no address for the debugger: give a port (0-65535) or a path")]
    Address(String),
    /// The socket cannot be made there.
    #[error("Could not listen for a debugger on {address}")]
    Listen {
        /// Where.
        address: Address,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The host gives no thread.
    #[error("Could not start the debugger's thread")]
    Thread(#[source] io::Error),
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

type Sides = (Box<dyn Read + Send>, Box<dyn Write + Send>);

/// One debugger's connection.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Its reading and its writing side.
    fn split(&self) -> io::Result<Sides> {
        match self {
            Stream::Tcp(stream) => {
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
                Ok((Box::new(stream.try_clone()?), Box::new(stream.try_clone()?)))
            }
            Stream::Unix(stream) => {
                stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
                Ok((Box::new(stream.try_clone()?), Box::new(stream.try_clone()?)))
            }
        }
    }

    /// Ends the reading thread.
    fn hang_up(&self) {
        let how = std::net::Shutdown::Both;
        let _ = match self {
            Stream::Tcp(stream) => stream.shutdown(how),
            Stream::Unix(stream) => stream.shutdown(how),
        };
    }
}

impl Listener {
    fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Tcp(listener) => listener.accept().map(|(stream, _)| Stream::Tcp(stream)),
            Listener::Unix(listener) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
        }
    }
}

/// A door that listens but lets nobody in yet.
pub struct Door {
    listener: Listener,
    address: Address,
}

/// Makes the Unix socket; a dead one left at `path` by an earlier run is replaced, anything else kept.
fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            let dead = path.symlink_metadata()?.file_type().is_socket()
                && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
            if !dead {
                return Err(e);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

impl Door {
    /// Listens at `address`.
    ///
    /// # Errors
    /// When the address is taken or not permitted.
    pub fn listen(address: &Address) -> Result<Door, GdbError> {
        let fail = |source| GdbError::Listen { address: address.clone(), source };
        match address {
            Address::Port(port) => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).map_err(fail)?;
                let port = listener.local_addr().map_err(fail)?.port();
                Ok(Door { listener: Listener::Tcp(listener), address: Address::Port(port) })
            }
            Address::Path(path) => {
                let listener = listen_unix(path).map_err(fail)?;
                Ok(Door { listener: Listener::Unix(listener), address: address.clone() })
            }
        }
    }

    /// Where the door is (the port that was taken, if any was asked for).
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Lets debuggers in, one at a time, on a thread of its own.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn open(self, target: Arc<dyn Target>) -> Result<OpenDoor, GdbError> {
        let shared = Arc::new(Shared::default());
        let address = self.address.clone();
        let thread = {
            let shared = Arc::clone(&shared);
            let serve = move || accept_all(&self.listener, &shared, &*target);
            std::thread::Builder::new().name("gdb".into()).spawn(serve).map_err(GdbError::Thread)?
        };
        Ok(OpenDoor { shared, address, thread: Some(thread) })
    }
}

#[derive(Default)]
struct Shared {
    /// The session that is on, if any.
    session: Mutex<Option<Sender<Event>>>,
    closing: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Sender<Event>>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: Event) -> bool {
        self.lock().as_ref().is_some_and(|session| session.send(event).is_ok())
    }
}

/// A door in use. Dropping it ends the session and removes the socket.
pub struct OpenDoor {
    shared: Arc<Shared>,
    address: Address,
    thread: Option<JoinHandle<()>>,
}

impl OpenDoor {
    /// vCPU `index` has parked itself on `event`. Says whether a debugger takes care of it; if not, let
    /// the vCPU go on.
    #[must_use]
    pub fn stopped(&self, index: usize, event: DebugEvent) -> bool {
        self.shared.tell(Event::Stopped(index, event))
    }

    /// The machine was built anew and its vCPUs are parked. Says whether a debugger lets them go; if not,
    /// do it yourself.
    #[must_use]
    pub fn rebuilt(&self) -> bool {
        self.shared.tell(Event::Rebuilt)
    }

    /// The machine has ended with process status `status`; a debugger is told.
    pub fn ended(&self, status: u8) {
        self.shared.closing.store(true, Ordering::Release);
        self.shared.tell(Event::Ended(status));
    }
}

impl Drop for OpenDoor {
    fn drop(&mut self) {
        self.ended(0);
        // A connection of our own ends the wait for the next debugger.
        match &self.address {
            Address::Port(port) => drop(TcpStream::connect((Ipv4Addr::LOCALHOST, *port))),
            Address::Path(path) => drop(UnixStream::connect(path)),
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Address::Path(path) = &self.address {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn accept_all(listener: &Listener, shared: &Shared, target: &dyn Target) {
    while !shared.closing.load(Ordering::Acquire) {
        match listener.accept() {
            Ok(_) if shared.closing.load(Ordering::Acquire) => return,
            Ok(stream) => {
                if let Err(e) = session(&stream, shared, target) {
                    tracing::warn!("The debugger's session ended: {e}");
                }
            }
            Err(e) => {
                tracing::warn!("Could not accept a debugger: {e}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn session(stream: &Stream, shared: &Shared, target: &dyn Target) -> Result<(), String> {
    let (reader, writer) = stream.split().map_err(|e| e.to_string())?;
    let (sender, events) = mpsc::channel();
    let bytes = sender.clone();
    std::thread::Builder::new()
        .name("gdb-reader".into())
        .spawn(move || forward(reader, &bytes))
        .map_err(|e| e.to_string())?;
    *shared.lock() = Some(sender);
    if shared.closing.load(Ordering::Acquire) {
        *shared.lock() = None;
        stream.hang_up();
        return Ok(());
    }
    tracing::info!("A debugger is attached");
    let end = session::serve(target, &events, writer);
    *shared.lock() = None;
    stream.hang_up();
    late(&events, target);
    tracing::info!("The debugger is gone: {end:?}");
    end.map(drop)
}

/// A machine that was built anew, or a vCPU that parked itself, while the session was ending must not
/// stay parked.
fn late(events: &Receiver<Event>, target: &dyn Target) {
    if events.try_iter().any(|event| matches!(event, Event::Rebuilt | Event::Stopped(..))) {
        target.resume(&vec![true; target.vcpus()]);
    }
}

/// Bytes from the debugger, as they come. The channel is bounded by the debugger itself: it waits for an
/// answer to each packet.
fn forward(mut reader: Box<dyn Read + Send>, to: &Sender<Event>) {
    let mut chunk = [0; 4096];
    loop {
        match reader.read(&mut chunk) {
            Ok(0) | Err(_) => {
                let _ = to.send(Event::Closed);
                return;
            }
            Ok(len) => {
                if to.send(Event::Bytes(chunk[..len].to_vec())).is_err() {
                    return;
                }
            }
        }
    }
}
