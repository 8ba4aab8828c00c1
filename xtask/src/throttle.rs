//! A cgroup with a share of a processor.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// A cgroup with a limit. It is removed with its owner, when it is empty.
pub struct Throttle {
    dir: PathBuf,
    v2: bool,
}

impl Throttle {
    /// One that gets `share` of a processor in each `period`.
    ///
    /// # Errors
    /// When the host's cgroups do not let us.
    pub fn share(period: Duration, share: f64) -> Result<Throttle> {
        let name = format!("wardian-lab-{}", std::process::id());
        let us = period.as_micros();
        let quota = (us as f64 * share) as u128;
        for (root, v2) in [("/sys/fs/cgroup", true), ("/sys/fs/cgroup/cpu", false)] {
            let probe = if v2 { "cgroup.subtree_control" } else { "cpu.cfs_quota_us" };
            if !PathBuf::from(root).join(probe).is_file() {
                continue;
            }
            if v2 {
                // Fails where the controller is already on or not ours to turn on; cpu.max tells.
                let _ = fs::write(format!("{root}/cgroup.subtree_control"), "+cpu");
            }
            let dir = PathBuf::from(root).join(&name);
            if !dir.is_dir() {
                fs::create_dir(&dir).with_context(|| format!("Cannot make the cgroup {}", dir.display()))?;
            }
            let throttle = Throttle { dir, v2 };
            if v2 {
                throttle.write("cpu.max", &format!("{quota} {us}"))?;
            } else {
                throttle.write("cpu.cfs_period_us", &us.to_string())?;
                throttle.write("cpu.cfs_quota_us", &quota.to_string())?;
            }
            return Ok(throttle);
        }
        bail!("This host has no cgroup with a cpu controller that can be used")
    }

    /// Puts process `pid` in.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn add(&self, pid: u32) -> Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// No limit from now on.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn lift(&self) -> Result<()> {
        if self.v2 { self.write("cpu.max", "max") } else { self.write("cpu.cfs_quota_us", "-1") }
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.dir.join(file);
        fs::write(&path, text).with_context(|| format!("Cannot write '{text}' to {}", path.display()))
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.dir);
    }
}
