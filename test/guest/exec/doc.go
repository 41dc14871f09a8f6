// Command spectrum-test-exec is the tests' hand inside a guest. "serve" runs
// commands that come over vsock, see package execclient; the other verbs do
// what busybox cannot: speak raw vsock, race renames, write file
// capabilities.
package main
