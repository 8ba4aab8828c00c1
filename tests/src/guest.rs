//! The guests: Debian from the cache, the tiny ones from `guests/`.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tempfile::NamedTempFile;

use crate::log::findings;
use crate::program::{cargo, output};
use crate::run::{Ended, Run};

/// Which stock kernel, and in which shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// `linux-image-cloud-amd64`, bzImage.
    Cloud,
    /// The same as uncompressed ELF, started by its PVH note.
    CloudElf,
    /// `linux-image-amd64`, bzImage.
    Full,
}

/// The stock Debian guest. Its root disk is read-only unless another one is given.
pub struct Debian {
    kernel: PathBuf,
    initrd: PathBuf,
    root: String,
    disks: Vec<String>,
    command_line: String,
    script: Option<String>,
    run: Run,
}

/// The longest script that goes on the kernel command line; Linux takes 2047 bytes of that in all.
const SHORT: usize = 1300;

/// Makes (or finds made) a kernel and the root disk, and tells where they are.
fn made(kernel: Kernel) -> &'static Result<serde_json::Value, String> {
    static CLOUD: OnceLock<Result<serde_json::Value, String>> = OnceLock::new();
    static FULL: OnceLock<Result<serde_json::Value, String>> = OnceLock::new();
    let (place, name) = match kernel {
        Kernel::Cloud | Kernel::CloudElf => (&CLOUD, "cloud"),
        Kernel::Full => (&FULL, "full"),
    };
    place.get_or_init(|| {
        let mut cargo = cargo();
        cargo.args(["run", "--quiet", "-p", "xtask", "--", "guest", "debian", "--json", "--kernel", name]);
        let text = output(&mut cargo)?;
        serde_json::from_str(&text).map_err(|error| format!("{cargo:?} says {text}: {error}"))
    })
}

impl Debian {
    /// The guest with this kernel, which runs `script` by `sh` and then powers off.
    ///
    /// # Errors
    /// Why there is no such guest on this machine.
    pub fn script(kernel: Kernel, script: &str) -> Result<Debian, String> {
        let mut guest = Debian::shell(kernel)?;
        // Only what is worse than a warning goes to the console, so that it does not go between the answers.
        guest.command_line += " quiet";
        guest.script = Some(script.to_owned());
        Ok(guest)
    }

    /// The guest with this kernel, which gives a shell.
    ///
    /// # Errors
    /// Why there is no such guest on this machine.
    pub fn shell(kernel: Kernel) -> Result<Debian, String> {
        let made = made(kernel).as_ref().map_err(Clone::clone)?;
        let path = |name: &str| PathBuf::from(made[name].as_str().unwrap_or_default());
        Ok(Debian {
            kernel: path(if kernel == Kernel::CloudElf { "vmlinux" } else { "kernel" }),
            initrd: path("initrd"),
            root: format!("{},readonly", path("disk").display()),
            disks: Vec::new(),
            script: None,
            command_line: "console=ttyS0 panic=-1".to_owned(),
            run: Run::default().args(["--no-reboot"]),
        })
    }

    /// Path of the root disk's image.
    #[must_use]
    pub fn root_image(&self) -> PathBuf {
        PathBuf::from(self.root.trim_end_matches(",readonly"))
    }

    /// Path of the kernel's file.
    #[must_use]
    pub fn kernel_image(&self) -> &Path {
        &self.kernel
    }

    /// Takes another root disk, as `--disk` understands it.
    #[must_use]
    pub fn root(mut self, disk: &str) -> Debian {
        disk.clone_into(&mut self.root);
        self
    }

    /// Adds a disk, as `--disk` understands it: `/dev/vdb`, then `/dev/vdc` and so on.
    #[must_use]
    pub fn disk(mut self, disk: &str) -> Debian {
        self.disks.push(disk.to_owned());
        self
    }

    /// Adds words to the kernel command line.
    #[must_use]
    pub fn words(mut self, words: &str) -> Debian {
        write!(self.command_line, " {words}").expect("to memory");
        self
    }

    /// Adds options.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Debian {
        self.run = self.run.args(args);
        self
    }

    /// The command line for Wardian. A script that is too long for the kernel's goes on one more disk.
    ///
    /// # Panics
    /// If that disk cannot be made.
    #[must_use]
    pub fn build(mut self) -> Run {
        let mut run = self.run;
        if let Some(script) = self.script {
            let mut word = base64(script.as_bytes());
            if word.len() > SHORT {
                let mut text = script.into_bytes();
                text.resize(text.len().next_multiple_of(4096), b'\n');
                let file = NamedTempFile::new().expect("a disk for the script");
                std::fs::write(file.path(), text).expect("a disk for the script");
                let letter = char::from(b'b' + self.disks.len() as u8);
                word = base64(format!("cat /dev/vd{letter} > /tmp/script; . /tmp/script").as_bytes());
                self.disks.push(format!("{},readonly,format=raw", file.path().display()));
                run = run.keep(file);
            }
            write!(self.command_line, " wardian.run={word}").expect("to memory");
        }
        run = run.args(["--kernel".as_ref(), self.kernel.as_os_str()]);
        run = run.args(["--initrd".as_ref(), self.initrd.as_os_str()]);
        run = run.args(["--serial", "stdio", "--disk", &self.root]);
        for disk in &self.disks {
            run = run.args(["--disk", disk]);
        }
        run.args(["--cmdline", &self.command_line])
    }

    /// Runs it to its end, which must be a power-off after the script's success, without complaints of the
    /// guest's kernel on the way.
    ///
    /// # Panics
    /// If something is not so.
    #[must_use]
    pub fn run(self) -> Ended {
        let ended = self.build().run();
        well_ended(&ended);
        ended
    }
}

/// Checks that a script ended with 0, the guest powered off, and its kernel did not complain.
///
/// # Panics
/// If something is not so.
pub fn well_ended(ended: &Ended) {
    let worst: Vec<_> = findings(&ended.serial).into_iter().filter(|found| found.fatal).collect();
    assert!(worst.is_empty(), "the guest's kernel says {worst:?}");
    assert!(ended.serial.contains("\nWARDIAN-EXIT 0 "), "the script failed");
    assert_eq!(ended.code(), Some(0), "the guest powers off");
    let messages: Vec<&str> = ended.stderr.lines().filter(|line| !line.contains("Engine ")).collect();
    // What the host does to the machine is no fault of it.
    let expected = [
        "Debuggers may attach",
        "the host did not run it",
        "The process was stopped",
        "Paused",
        "Goes on after",
    ];
    assert!(
        messages.iter().all(|line| expected.iter().any(|text| line.contains(text))),
        "Wardian has nothing to say but its engine: {messages:?}"
    );
}

/// The lines between `@@ name` and the next line that begins so.
///
/// # Panics
/// If there is no such section.
#[must_use]
pub fn section<'a>(serial: &'a str, name: &str) -> &'a str {
    let head = format!("\n@@ {name}\n");
    let start = serial.find(&head).unwrap_or_else(|| panic!("no section {name} in the serial log"));
    let rest = &serial[start + head.len()..];
    &rest[..rest.find("@@ ").or_else(|| rest.find("WARDIAN-EXIT")).unwrap_or(rest.len())]
}

/// Builds the tiny guests, once, and tells where `name` is.
///
/// # Panics
/// If they cannot be built.
#[must_use]
pub fn tiny(name: &str) -> PathBuf {
    static BUILT: OnceLock<Vec<PathBuf>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let mut cargo = cargo();
        cargo.args(["run", "--quiet", "-p", "xtask", "--", "guests"]);
        let text = output(&mut cargo).unwrap_or_else(|error| panic!("{error}"));
        text.lines().map(PathBuf::from).collect()
    });
    let found = built.iter().find(|path| path.file_name().is_some_and(|n| n == name));
    found.unwrap_or_else(|| panic!("no guest {name} among {built:?}")).clone()
}

/// RFC 4648, section 4, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let value = word >> (18 - 6 * digit) & 63;
            text.push(if digit <= chunk.len() { DIGITS[value as usize] as char } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{base64, section};

    #[test]
    fn base64_of_all_lengths() {
        for (plain, coded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
        assert_eq!(base64(&[0xff, 0xfe, 0xfb]), "//77");
    }

    #[test]
    fn sections_end_where_the_next_begins() {
        let serial = "x\n@@ one\n1\n2\n@@ two\n3\nWARDIAN-EXIT 0 1.2\n";
        assert_eq!((section(serial, "one"), section(serial, "two")), ("1\n2\n", "3\n"));
    }
}
