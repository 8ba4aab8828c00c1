//! The same steps on this machine itself, in a chroot of the same root.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::run::output;

/// Mounts what the steps need in a mount namespace of its own, which ends with the process.
const ENTER: &str = "root=$1; shift; mount -t proc proc \"$root/proc\" && mount --rbind /dev \"$root/dev\" && \
                     mount -t tmpfs tmp \"$root/tmp\" && exec chroot \"$root\" \"$@\"";

/// Takes the root out of the disk image into the folder `root`, without mounting it.
///
/// # Errors
/// When that fails.
pub fn extract(disk: &Path, root: &Path) -> Result<()> {
    std::fs::create_dir_all(root)?;
    // debugfs splits its commands at blanks unless they are quoted.
    let dump = format!("rdump / \"{}\"", root.display());
    output(Command::new("debugfs").args(["-R", &dump]).arg(disk))?;
    output(Command::new("sync").arg("-f").arg(root))?;
    Ok(())
}

/// What runs `bash script steps...` in `root` on as many of the host's cores as a machine has vCPUs.
pub fn command(root: &Path, script: &str, steps: &[&str], cpus: u32) -> Command {
    let mut command = Command::new("taskset");
    command.arg("--cpu-list").arg(format!("0-{}", cpus.saturating_sub(1)));
    command
        .args(["unshare", "--mount", "sh", "-c", ENTER, "sh"])
        .arg(root)
        .args(["bash", script])
        .args(steps);
    command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.envs([("HOME", "/root"), ("LANG", "C.UTF-8"), ("TERM", "vt220")]);
    command
}
