//! A stock kernel out of its package: bzImage, modules, initial RAM disk and the uncompressed ELF.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::{Kernel, archive, atomically, initrd};
use crate::run::{Step, need, output, which};

/// A kernel in the cache: `dir` holds `vmlinuz`, `vmlinux`, `initrd.img`, `modules/lib/modules/<version>`.
pub struct Made {
    pub version: String,
    pub dir: PathBuf,
}

pub fn make(place: &Path, kind: Kernel, force: bool) -> Result<Made> {
    let dir = place.join(format!("kernel-{}", kind.name()));
    let stamp = initrd::recipe();
    let current = |dir: &Path| -> Option<String> {
        let text = fs::read_to_string(dir.join("stamp")).ok()?;
        let (version, recipe) = text.split_once('\n')?;
        (recipe == stamp).then(|| version.to_owned())
    };
    if let (false, Some(version)) = (force, current(&dir)) {
        return Ok(Made { version, dir });
    }
    need(&[("dpkg-deb", "dpkg"), ("apt-cache", "apt"), ("depmod", "kmod")])?;
    archive::know(kind.package(), force)?;
    let package = archive::stands_for(kind.package(), "linux-image-")?;
    let version = package.trim_start_matches("linux-image-").to_owned();
    atomically(&dir, |part| {
        let step = Step::begin(format!("Kernel {package}"));
        let packages = part.join("packages");
        let deb = archive::download(&step, &package, &packages)?;
        let busybox = archive::download(&step, "busybox-static", &packages)?;
        let (tree, tools) = (packages.join("kernel"), packages.join("busybox"));
        step.run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree))?;
        step.run(Command::new("dpkg-deb").arg("-x").arg(&busybox).arg(&tools))?;
        fs::rename(tree.join(format!("boot/vmlinuz-{version}")), part.join("vmlinuz"))?;
        // Debian releases with a merged /usr ship modules under /usr/lib.
        let modules = part.join("modules/lib/modules");
        fs::create_dir_all(&modules)?;
        let from = ["lib/modules", "usr/lib/modules"]
            .iter()
            .map(|d| tree.join(d).join(&version))
            .find(|d| d.is_dir())
            .with_context(|| format!("{package} has no modules of {version}"))?;
        fs::rename(from, modules.join(&version))?;
        step.say("depmod");
        let depmod = which("depmod").context("depmod is missing")?;
        step.run(Command::new(depmod).arg("-b").arg(part.join("modules")).arg(&version))?;
        step.say("initrd");
        let shell = ["bin/busybox", "usr/bin/busybox"]
            .iter()
            .map(|f| tools.join(f))
            .find(|f| f.is_file())
            .context("busybox-static has no busybox")?;
        initrd::write(&part.join("initrd.img"), &modules.join(&version), &shell)?;
        step.say("vmlinux");
        uncompress(&part.join("vmlinuz"), &part.join("vmlinux"))?;
        fs::remove_dir_all(&packages)?;
        fs::write(part.join("stamp"), format!("{version}\n{stamp}"))?;
        step.end();
        Ok(())
    })?;
    Ok(Made { version, dir })
}

/// Magic numbers of the compressions that Linux may use for its payload, and who undoes each.
const PAYLOADS: [(&[u8], &str, &str); 6] = [
    (&[0x1f, 0x8b], "gzip", "gzip"),
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz", "xz-utils"),
    (&[0x28, 0xb5, 0x2f, 0xfd], "zstd", "zstd"),
    (&[0x02, 0x21, 0x4c, 0x18], "lz4", "lz4"),
    (b"BZh", "bzip2", "bzip2"),
    (&[0x5d, 0, 0], "lzma", "xz-utils"),
];

/// Writes the ELF kernel inside the bzImage `from` to `to`. The setup header (boot protocol 2.08 and later)
/// says where the compressed payload lies; all compressions but gzip have the size in 4 bytes behind it.
fn uncompress(from: &Path, to: &Path) -> Result<()> {
    let image = fs::read(from)?;
    let word =
        |at: usize| image.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize);
    let payload = (|| {
        let setup = match *image.get(0x1f1)? {
            0 => 4,
            n => usize::from(n),
        };
        let start = (setup + 1) * 512 + word(0x248)?;
        image.get(start..start + word(0x24c)?)
    })()
    .with_context(|| format!("{} has no payload where its header says", from.display()))?;
    let Some((magic, program, package)) = PAYLOADS.iter().find(|(magic, ..)| payload.starts_with(magic))
    else {
        bail!("The payload of {} is compressed in no known way", from.display());
    };
    need(&[(program, package)])?;
    let body = if magic[0] == 0x1f { payload } else { &payload[..payload.len().saturating_sub(4)] };
    let mut child =
        Command::new(program).arg("-dc").stdin(Stdio::piped()).stdout(File::create(to)?).spawn()?;
    child.stdin.take().context("no pipe")?.write_all(body)?;
    let status = child.wait()?;
    if !status.success() {
        bail!("{program} cannot undo the payload of {}: {status}", from.display());
    }
    let head = output(Command::new("head").args(["-c", "4"]).arg(to))?;
    if head.as_bytes() != b"\x7fELF" {
        bail!("The payload of {} is no ELF", from.display());
    }
    Ok(())
}
