//! Where sockets are, and which of them are alive.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Bytes that a socket's path may have (`sun_path`, with its end).
const LONGEST: usize = 107;
/// What a socket's name ends with.
const ENDING: &str = "sock";

/// A socket that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The directory cannot be made or read.
    #[error("Could not use directory {} for control sockets", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Somebody else could reach what is in it.
    #[error("Directory {} for control sockets is not safe: {why}", path.display())]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Another machine has the name.
    #[error("A machine named {0} runs already")]
    Taken(String),
    /// The path is too long for a socket.
    #[error("{} is too long for a socket: {LONGEST} bytes are possible; give a shorter name or another XDG_RUNTIME_DIR", .0.display())]
    TooLong(PathBuf),
    /// The socket cannot be made.
    #[error("Could not make socket {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The directory of this user's control sockets.
#[derive(Clone, Debug)]
pub struct Directory(PathBuf);

impl Directory {
    /// `wardian` in `$XDG_RUNTIME_DIR` or else in `/run/user/UID`, or else `/tmp/wardian-UID`; made if it is not
    /// there. It is this user's alone.
    ///
    /// # Errors
    /// When it cannot be made, or is not this user's alone.
    pub fn open() -> Result<Directory, PlaceError> {
        let user = rustix::process::geteuid().as_raw();
        let given = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let usual = PathBuf::from(format!("/run/user/{user}"));
        let ours = |dir: &PathBuf| {
            dir.is_absolute() && fs::metadata(dir).is_ok_and(|m| m.is_dir() && m.uid() == user)
        };
        let path = match given.into_iter().chain([usual]).find(ours) {
            Some(runtime) => runtime.join("wardian"),
            None => PathBuf::from(format!("/tmp/wardian-{user}")),
        };
        Directory::at(path, user)
    }

    pub(crate) fn at(path: PathBuf, user: u32) -> Result<Directory, PlaceError> {
        let refused = |source| PlaceError::Directory { path: path.clone(), source };
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(refused(error)),
            _ => {}
        }
        // Not through a link: in /tmp anybody can lay one.
        let found = fs::symlink_metadata(&path).map_err(refused)?;
        let why = if !found.is_dir() {
            "it is no directory".to_owned()
        } else if found.uid() != user {
            format!("it belongs to user {}", found.uid())
        } else if found.mode() & 0o077 != 0 {
            format!("its mode is {:o}, not 700", found.mode() & 0o7777)
        } else {
            return Ok(Directory(path));
        };
        Err(PlaceError::Unsafe { path, why })
    }

    /// The socket of machine `name`.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.{ENDING}"))
    }

    /// The names of the machines that are alive, sorted. Sockets of dead ones are removed.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn names(&self) -> Result<Vec<String>, PlaceError> {
        let _lock = self.lock()?;
        self.sweep()
    }

    /// Removes the sockets of the dead and gives the names of the others, sorted. The lock is held.
    fn sweep(&self) -> Result<Vec<String>, PlaceError> {
        let refused = |source| PlaceError::Directory { path: self.0.clone(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.0).map_err(refused)? {
            let path = entry.map_err(refused)?.path();
            let name = path
                .file_stem()
                .and_then(OsStr::to_str)
                .filter(|_| path.extension() == Some(OsStr::new(ENDING)));
            match name {
                Some(name) if is_alive(&path) => names.push(name.to_owned()),
                Some(_) => remove(&path),
                None => {}
            }
        }
        names.sort();
        Ok(names)
    }

    /// Removes the socket of machine `name` if that is dead; says whether it is alive.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn is_alive(&self, name: &str) -> Result<bool, PlaceError> {
        let _lock = self.lock()?;
        let path = self.socket(name);
        let alive = is_alive(&path);
        if !alive {
            remove(&path);
        }
        Ok(alive)
    }

    /// Makes the socket of machine `name`.
    pub(crate) fn claim(&self, name: &str) -> Result<(Claim, UnixListener), PlaceError> {
        let path = self.socket(name);
        if path.as_os_str().len() > LONGEST {
            return Err(PlaceError::TooLong(path));
        }
        let _lock = self.lock()?;
        // Whoever was killed since somebody last looked leaves nothing behind either.
        if self.sweep()?.iter().any(|other| other == name) {
            return Err(PlaceError::Taken(name.to_owned()));
        }
        let made = || {
            let listener = UnixListener::bind(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            Ok((identity(&path)?, listener))
        };
        let (id, listener) = made().map_err(|source| PlaceError::Socket { path: path.clone(), source })?;
        Ok((Claim { directory: self.clone(), path, id }, listener))
    }

    /// Nobody else makes or removes sockets while it is held.
    fn lock(&self) -> Result<File, PlaceError> {
        let locked = || {
            let directory = File::open(&self.0)?;
            rustix::io::retry_on_intr(|| flock(&directory, FlockOperation::LockExclusive))?;
            Ok(directory)
        };
        locked().map_err(|source| PlaceError::Directory { path: self.0.clone(), source })
    }
}

/// Device and inode.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// Whether a process listens there. One that is stopped or busy does, and is not waited for.
fn is_alive(path: &Path) -> bool {
    let knock = || {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &address)
    };
    !matches!(knock(), Err(Errno::CONNREFUSED | Errno::NOENT))
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!("Could not remove the stale socket {}: {error}", path.display());
    }
}

/// A socket of this process. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct Claim {
    directory: Directory,
    path: PathBuf,
    id: (u64, u64),
}

impl Claim {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let lock = self.directory.lock();
        // Somebody may have cleaned up and another machine may have the name now.
        if lock.is_ok() && identity(&self.path).is_ok_and(|id| id == self.id) {
            remove(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use super::{Directory, PlaceError};

    fn place() -> (tempfile::TempDir, Directory, u32) {
        let dir = tempfile::tempdir().unwrap();
        let user = rustix::process::geteuid().as_raw();
        let place = Directory::at(dir.path().join("wardian"), user).unwrap();
        (dir, place, user)
    }

    #[test]
    fn a_name_is_had_once_and_leaves_nothing() {
        let (_dir, place, _) = place();
        let (claim, listener) = place.claim("one").unwrap();
        assert_eq!(fs::metadata(claim.path()).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(place.claim("one"), Err(PlaceError::Taken(name)) if name == "one"));
        let two = place.claim("two").unwrap();
        assert_eq!(place.names().unwrap(), ["one", "two"]);
        drop(two);
        assert_eq!(place.names().unwrap(), ["one"]);
        drop((claim, listener));
        assert_eq!(fs::read_dir(&place.0).unwrap().count(), 0);
    }

    #[test]
    fn a_dead_socket_is_recognized_and_removed() {
        let (_dir, place, _) = place();
        for _ in 0..2 {
            drop(UnixListener::bind(place.socket("dead")).unwrap());
            assert!(place.socket("dead").exists());
            assert!(!place.is_alive("dead").unwrap());
            assert!(!place.socket("dead").exists());
        }
        drop(UnixListener::bind(place.socket("dead")).unwrap());
        fs::write(place.0.join("other"), "not ours").unwrap();
        assert!(place.names().unwrap().is_empty());
        assert!(!place.socket("dead").exists() && place.0.join("other").exists());
        drop(UnixListener::bind(place.socket("dead")).unwrap());
        let (claim, _listener) = place.claim("dead").unwrap();
        // The socket of the name's next owner is left alone.
        fs::remove_file(claim.path()).unwrap();
        let next = UnixListener::bind(place.socket("dead")).unwrap();
        drop(claim);
        assert!(place.is_alive("dead").unwrap());
        drop(next);
    }

    #[test]
    fn a_machine_that_accepts_nobody_is_alive_and_not_waited_for() {
        let (_dir, place, _) = place();
        // Its backlog is full soon.
        let _listener = UnixListener::bind(place.socket("stuck")).unwrap();
        let all = (0..300).all(|_| place.is_alive("stuck").unwrap());
        assert!(all && place.names().unwrap() == ["stuck"]);
    }

    #[test]
    fn many_want_one_name_over_a_dead_socket_and_one_has_it() {
        let (_dir, place, _) = place();
        for _ in 0..20 {
            drop(UnixListener::bind(place.socket("x")).unwrap());
            let claims: Vec<_> = std::thread::scope(|scope| {
                let all: Vec<_> = (0..8).map(|_| scope.spawn(|| place.claim("x"))).collect();
                all.into_iter().map(|claim| claim.join().unwrap()).collect()
            });
            assert_eq!(claims.iter().filter(|claim| claim.is_ok()).count(), 1);
            assert!(place.is_alive("x").unwrap());
        }
    }

    #[test]
    fn a_directory_that_others_can_reach_is_refused() {
        let (dir, place, user) = place();
        let why = |path: &str| Directory::at(dir.path().join(path), user).unwrap_err().to_string();
        fs::set_permissions(&place.0, fs::Permissions::from_mode(0o750)).unwrap();
        assert!(why("wardian").contains("its mode is 750, not 700"));
        symlink("/tmp", dir.path().join("link")).unwrap();
        assert!(why("link").contains("it is no directory"));
        assert!(why("no/such").contains("Could not use directory"));
        fs::set_permissions(&place.0, fs::Permissions::from_mode(0o700)).unwrap();
        let other = Directory::at(dir.path().join("wardian"), user + 1).unwrap_err();
        assert!(other.to_string().contains("it belongs to user"), "{other}");
        let long = place.claim(&"x".repeat(100)).unwrap_err();
        assert!(matches!(long, PlaceError::TooLong(_)), "{long}");
    }
}
