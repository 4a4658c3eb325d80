//! Where an MQTT broker is.

use std::str::FromStr;

/// Where the broker is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Name or address, without a scheme.
    pub host: String,
    /// 8883 unless given.
    pub port: u16,
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = match text.rsplit_once(':') {
            None => (text, 8883),
            Some((host, port)) => match port.parse() {
                Ok(port) => (host, port),
                Err(_) => return Err(format!("{text:?} is no endpoint: expected HOST or HOST:PORT")),
            },
        };
        if host.is_empty() || host.contains(['/', ' ']) {
            return Err(format!("{text:?} is no endpoint: expected HOST or HOST:PORT, without a scheme"));
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_host_with_or_without_a_port() {
        assert_eq!("localhost".parse(), Ok(Endpoint { host: "localhost".into(), port: 8883 }));
        assert_eq!("10.0.0.1:443".parse(), Ok(Endpoint { host: "10.0.0.1".into(), port: 443 }));
        assert!("https://host".parse::<Endpoint>().unwrap_err().contains("expected HOST or HOST:PORT"));
        assert!("".parse::<Endpoint>().is_err());
    }
}
