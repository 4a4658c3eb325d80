//! An authority, the broker's certificate, and a key and a certificate for each device, in folders as `device-simulator
//! provision` makes them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::json;

const PREFIX: &str = "sim-";
/// The name that the broker's certificate is for.
pub(crate) const HOST: &str = "localhost";

/// The name of a device.
pub(crate) fn thing(index: usize) -> String {
    format!("{PREFIX}{:05}", index + 1)
}

/// The place of the device of that name.
pub(crate) fn index(thing: &str) -> Option<usize> {
    thing.strip_prefix(PREFIX)?.parse::<usize>().ok()?.checked_sub(1)
}

/// Where things are.
pub(crate) struct Folder {
    root: PathBuf,
    state: PathBuf,
}

impl Folder {
    /// Makes the authority, the broker's certificate and those of so many devices.
    pub(crate) fn create(root: &Path, state: &Path, devices: usize) -> Result<Self> {
        let folder = Self { root: root.to_owned(), state: state.to_owned() };
        fs::create_dir_all(folder.devices())?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "simulator-bench");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        fs::write(folder.ca(), authority.pem())?;
        let [certificate, key] = folder.broker();
        certify(&authority, &CertificateParams::new([HOST.to_owned()])?, &certificate, &key)?;
        for device in 0..devices {
            folder.write_device(&authority, device)?;
        }
        Ok(folder)
    }

    fn write_device(&self, authority: &CertifiedIssuer<'_, KeyPair>, device: usize) -> Result<()> {
        let thing = thing(device);
        let folder = self.devices().join(&thing);
        fs::create_dir_all(&folder)?;
        // By turns, as in a fleet that is being modernised.
        let protocol = if device.is_multiple_of(2) { "json" } else { "usp" };
        let identity = json!({"thing": thing, "protocol": protocol, "firmwareVersion": "1.0.0"});
        fs::write(folder.join("device.json"), identity.to_string())?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, thing);
        certify(authority, &params, &folder.join("certificate.pem"), &folder.join("private.key"))
    }

    /// The authority's certificate.
    pub(crate) fn ca(&self) -> PathBuf {
        self.root.join("ca.pem")
    }

    /// The broker's certificate and key.
    pub(crate) fn broker(&self) -> [PathBuf; 2] {
        ["broker.pem", "broker.key"].map(|name| self.root.join(name))
    }

    /// The folder of the devices' folders.
    pub(crate) fn devices(&self) -> PathBuf {
        self.root.join("devices")
    }

    /// Where the devices of a run keep their state: another place each time.
    pub(crate) fn state(&self, devices: usize) -> PathBuf {
        self.state.join(devices.to_string())
    }

    /// What the simulator says.
    pub(crate) fn log(&self, devices: usize) -> PathBuf {
        self.root.join(format!("simulator-{devices}.log"))
    }
}

fn certify(
    authority: &CertifiedIssuer<'_, KeyPair>,
    params: &CertificateParams,
    certificate: &Path,
    key_file: &Path,
) -> Result<()> {
    // P-256, as `provision` makes them.
    let key = KeyPair::generate()?;
    fs::write(certificate, params.signed_by(&key, authority)?.pem())?;
    Ok(fs::write(key_file, key.serialize_pem())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_by_its_name() {
        assert_eq!(thing(9_999), "sim-10000");
        assert_eq!([0, 9_999].map(|device| index(&thing(device))), [Some(0), Some(9_999)]);
        assert_eq!(["sim-0", "sim-", "other"].map(index), [None; 3]);
    }
}
