// Browsers start no worker from a file. Where the site is opened without a server, the search runs
// in a hidden frame instead, which is spoken to as if it were a worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const setup = () => {
        self.postMessage = (data) => parent.postMessage(data, "*")
        self.importScripts = (...urls) => urls.reduce((before, url) => before.then(() =>
          new Promise((resolve, reject) => {
            const script = document.createElement("script")
            Object.assign(script, { src: url, onload: resolve, onerror: reject })
            document.body.append(script)
          })), Promise.resolve())
      }
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = `<body><script>(${setup})()<\/script><script src="${url}"><\/script></body>`
      this.frame.onload = () => {
        this.loaded = true
        this.waiting.forEach((data) => this.postMessage(data))
      }
      window.addEventListener("message", (event) => {
        if (event.source !== this.frame.contentWindow) return
        const copy = new MessageEvent("message", { data: event.data })
        this.dispatchEvent(copy)
        if (this.onmessage) this.onmessage(copy)
      })
      document.body.append(this.frame)
    }

    postMessage(data) {
      if (!this.loaded) this.waiting.push(data)
      else this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
