// Counts lines of all its clients, in memory only, and answers each with the count so far.
const net = require('net');

let count = 0;
net.createServer((client) => {
  client.on('data', (data) => {
    for (const byte of data) {
      if (byte === 10) client.write(`${++count}\n`);
    }
  });
  client.on('error', () => {});
}).listen(8089, '0.0.0.0');
